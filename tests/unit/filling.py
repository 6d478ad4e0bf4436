"""Runs a command on disks of growing sizes, in a mount namespace of its own; a program of its own.

    unshare --map-root-user --mount python filling.py FOLDER WORDS...

WORDS is a command line without its destination, which is ``r.zarr`` on a disk mounted at FOLDER/disk. Prints a line of
JSON for each run: how much larger the disk is than what the whole result took of a roomy one, in bytes or in files; how
the run ended; and what it left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from scialm_dask import Imputation
from scialm_dask.__main__ import main as command

PAGE = 4096  # bytes, what such a disk is divided into
ROOMY = 1 << 30


def on_a_disk(disk, options, words):
    """How the command ended, what it left and all that was written; what that took of the disk, in bytes and files."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
    try:
        done = CliRunner().invoke(command, [*words, str(disk / "r.zarr"), "--quiet"])
        space, left = os.statvfs(disk), os.listdir(disk)
        files = {str(file.relative_to(disk)): file.read_bytes() for file in disk.rglob("*") if file.is_file()}
        if words[0] == "impute" and left:
            summary = Imputation.open(disk / "r.zarr").summary
            files["uns/scialm/summary"] = {k: summary[k] for k in ("rank", "verdict", "source", "singular_values")}
            del files["r.zarr/uns/scialm/summary/0"]  # which has the date, read above
        taken = (space.f_blocks - space.f_bfree) * space.f_frsize, space.f_files - space.f_ffree
        return {"code": done.exit_code, "says": done.stderr, "left": left}, files, *taken
    finally:
        subprocess.run(["umount", disk], check=True)


def main():
    disk, words = Path(sys.argv[1]) / "disk", sys.argv[2:]
    disk.mkdir()
    _, whole, taken, n_files = on_a_disk(disk, f"size={ROOMY}", words)
    shares = [int(taken * share) // PAGE * PAGE - taken for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9)]
    for more in (*shares, *(PAGE * n for n in (-8, -4, -3, -2, -1, 0, 1, 2, 8))):
        done, files, *_ = on_a_disk(disk, f"size={max(taken + more, PAGE)}", words)
        print(json.dumps({"bytes": more, **done, "whole": files == whole}))
    for more in (-n_files // 2, -2, -1, 0, 2):
        done, files, *_ = on_a_disk(disk, f"size={ROOMY},nr_inodes={n_files + more}", words)
        print(json.dumps({"files": more, **done, "whole": files == whole}))


if __name__ == "__main__":
    main()
