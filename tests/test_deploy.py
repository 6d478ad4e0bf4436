"""What sites copy: every file read by what will read it there, every command by the parser that will parse it."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import dask
import distributed
import jsonschema
import pytest
import yaml
from dask.utils import parse_timedelta

import scialm_dask
from scialm_dask.__main__ import main
from scialm_dask.run.cluster import connect

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted([*DEPLOY.rglob("*.sbatch"), *DEPLOY.rglob("*.sh"), ROOT / ".ci" / "run"])
QUEUES = {path.stem: path for path in sorted((DEPLOY / "jobqueue").glob("*.yaml"))}


def named(path):
    return str(path.relative_to(ROOT))


def needs(present, what):
    """Skip where something of the machine is absent, but fail in CI."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is absent; .ci/run installs it")


# Scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_shell_can_read_it(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    needs(shutil.which("shellcheck"), "shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


OURS = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run_job(script, source, result, **variables):
    """Run it as Slurm would, but for Slurm; in tests/slurm Slurm runs all of them."""
    done = subprocess.run(
        ["bash", DEPLOY / "slurm" / script, source, result, "--preset", "complete", "--validation", "0.2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | OURS | variables,
    )
    assert done.returncode == 0, done.stderr
    assert result.is_dir()
    return done.stderr


def test_the_job_of_one_node_runs_with_a_real_matrix(counts, store_of, tmp_path):
    run_job("impute.sbatch", store_of(counts), tmp_path / "imputed.zarr")


@pytest.mark.slow
def test_a_job_whose_checkpoint_was_never_whole_begins_anew(counts, store_of, tmp_path):
    """A run was killed when there was but the folder; the next goes to its end, and one more finds it finished."""
    source, result = store_of(counts), tmp_path / "imputed.zarr"
    Path(f"{result}.checkpoint", "000001").mkdir(parents=True)
    Path(f"{result}.checkpoint", ".lock").touch()
    assert "that run is finished" not in run_job("requeue.sbatch", source, result)
    assert "that run is finished" in run_job("requeue.sbatch", source, result)


def test_a_job_of_an_array_takes_its_own_sample(counts, store_of, tmp_path):
    first, second = store_of(counts, "s.1.h5ad"), store_of(counts, "s.2.h5ad")
    (tmp_path / "samples.txt").write_text(f"{first}\n{second}\n")
    run_job("array.sbatch", tmp_path / "samples.txt", tmp_path / "results", SLURM_ARRAY_TASK_ID="2")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["s.2.zarr"]


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sbatch")), ids=named)
def test_a_job_begins_with_what_to_edit_and_says_what_it_needs(script):
    text = script.read_text()
    first = text.splitlines()[1:4]
    assert [line.split("=")[0].split(":")[0] for line in first] == [
        "# To edit",
        "##SBATCH --account",
        "##SBATCH --partition",
    ]
    assert "activate" in text.partition("set -euo pipefail")[0]
    for option in ("nodes", "cpus-per-task", "mem", "time"):
        assert re.search(rf"^#SBATCH --{option}=", text, re.MULTILINE)


# Command lines


def parse(words):
    """Give the command to its own parser, which raises if it would refuse it."""
    from distributed.cli import dask_scheduler, dask_worker

    program, name, *rest = words
    commands = (
        main.commands if program == "scialm-dask" else {"scheduler": dask_scheduler.main, "worker": dask_worker.main}
    )
    if name == "--help":
        return
    commands[name].make_context(name, rest)


def commands_of(text):
    """Words of each command in a script or a comment, with something in place of what the shell would fill in."""
    text = re.sub(r"\\\n\s*", " ", text).replace('"$@"', "SRC DST").replace(' "${@:3}"', "")
    text = re.sub(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|\{[a-z_.:]+\}", "1", text)
    for found in re.finditer(r"(?<![\w./`-])(?:scialm-dask (?=[a-z])|dask (?=scheduler|worker)).*", text):
        line = re.split(r"\s(?:&|\||;|#)|[`|]", found.group())[0]
        yield shlex.split(line)


def commands_of_kubernetes(document):
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "args":
                yield [word.replace("$(DASK_WORKER_NAME)", "name") for word in value]
            else:
                yield from commands_of_kubernetes(value)
    elif isinstance(document, list):
        for value in document:
            yield from commands_of_kubernetes(value)


COMMANDS = {
    f"{named(path)}: {' '.join(words)}": words
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file()
    for words in (
        [*commands_of_kubernetes(yaml.safe_load(path.read_text()))]
        if "kubernetes" in path.parts and path.suffix == ".yaml"
        else []
    )
    + [words for words in commands_of(path.read_text()) if len(words) > 2 and "kubernetes" not in path.parts]
}


def test_there_are_commands():
    assert len(COMMANDS) > 15
    with pytest.raises(click.UsageError):
        parse(["scialm-dask", "impute", "SRC", "DST", "--scheduler-fil", "x"])
    with pytest.raises(click.UsageError):
        parse(["dask", "worker", "tcp://h:1", "--lifespan", "2h"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command):
    parse(COMMANDS[command])


# Dask's own files


@pytest.mark.parametrize("name", QUEUES)
def test_dask_jobqueue_writes_the_job(name):
    import dask_jobqueue

    settings = yaml.safe_load(QUEUES[name].read_text())["jobqueue"]
    assert list(settings) == [name]
    of_queue = settings[name]
    # its defaults name everything it knows; what it does not know it would ignore
    assert set(of_queue) <= set(dask.config.get(f"jobqueue.{name}"))
    with dask.config.set({f"jobqueue.{name}": dask.config.get(f"jobqueue.{name}") | of_queue}):
        kind = {"slurm": "SLURM", "pbs": "PBS", "sge": "SGE", "lsf": "LSF"}[name]
        job = getattr(dask_jobqueue, f"{kind}Cluster").job_cls("tcp://10.0.0.1:8786", name="w")
    script = job.job_script()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (worker,) = re.findall(r"-m distributed\.cli\.dask_worker (.*)", script)
    worker = worker.replace("${TMPDIR:-/tmp}", "/tmp")
    parse(["dask", "worker", *shlex.split(worker)])
    words = shlex.split(worker)
    options = dict(itertools.pairwise(words))
    hours, minutes = map(int, of_queue["walltime"].split(":")[:2])
    latest = parse_timedelta(options["--lifetime"]) + parse_timedelta(options["--lifetime-stagger"])
    assert latest < 3600 * hours + 60 * minutes
    assert options["--nthreads"] == "8"
    assert options["--interface"] == of_queue["interface"]


def test_all_queues_have_theirs():
    assert set(QUEUES) == {"slurm", "pbs", "sge", "lsf"}


def known_to_distributed(settings, defaults):
    for key, value in settings.items():
        assert key in defaults, key
        if isinstance(value, dict):
            known_to_distributed(value, defaults[key])


DASK_FILES = [DEPLOY / "distributed.yaml", DEPLOY / "jupyterhub" / "dask.yaml"]


@pytest.mark.parametrize("path", DASK_FILES, ids=named)
def test_distributed_knows_the_settings(path):
    folder = Path(distributed.__file__).parent
    settings = {"distributed": yaml.safe_load(path.read_text())["distributed"]}
    jsonschema.validate(settings, yaml.safe_load((folder / "distributed-schema.yaml").read_text()))
    known_to_distributed(settings, yaml.safe_load((folder / "distributed.yaml").read_text()))


def test_the_certificates_let_in_those_who_have_them(tmp_path):
    needs(shutil.which("openssl"), "openssl")
    made = subprocess.run([DEPLOY / "certificates.sh", tmp_path / "tls"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "tls").iterdir()} == {0}
    text = (DEPLOY / "distributed.yaml").read_text().replace("/etc/dask/tls", str(tmp_path / "tls"))
    with (
        dask.config.set(dict(flat(yaml.safe_load(text)))),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        with connect(cluster.scheduler_address) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        stranger = {"security": distributed.Security.temporary(), "timeout": "1s", "set_as_default": False}
        with pytest.raises((OSError, TimeoutError)):
            distributed.Client(cluster.scheduler_address, **stranger)


def flat(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Containers


def test_the_image_runs_as_nobody_special(tmp_path):
    from dockerfile_parse import DockerfileParser

    shutil.copy(DEPLOY / "docker" / "Dockerfile", tmp_path)
    steps = DockerfileParser(path=str(tmp_path)).structure
    users = [step["value"] for step in steps if step["instruction"] == "USER"]
    last_from = max(i for i, step in enumerate(steps) if step["instruction"] == "FROM")
    assert users == ["1000"]
    assert any(step["instruction"] == "USER" for step in steps[last_from:])
    copied = [step["value"].split() for step in steps if step["instruction"] == "COPY"]
    sources = [word for words in copied if not words[0].startswith("--from") for word in words[:-1]]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    (command,) = [json.loads(step["value"]) for step in steps if step["instruction"] == "CMD"]
    parse(command)


def test_the_image_of_apptainer_has_what_the_installation_needs():
    text = (DEPLOY / "apptainer" / "scialm.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL))
    copied = [line.split() for line in sections["files"].strip().splitlines()]
    assert all((ROOT / source).exists() and target == "/source/" for source, target in copied)
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    assert {source for source, _ in copied} == set(
        re.findall(r"pyproject.toml|README.md|LICENSE|scialm_dask(?= /)", dockerfile)
    )
    for script in ("post", "environment", "runscript", "test"):
        assert subprocess.run(["bash", "-n"], input=sections[script], text=True, check=False).returncode == 0
    assert sections["runscript"].split() == ["exec", "scialm-dask", '"$@"']


def test_the_environment_of_conda_installs_the_repository():
    path = DEPLOY / "environment.yml"
    environment = yaml.safe_load(path.read_text())
    python, _, of_pip = environment["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {python.partition('=')[2]}" in project["classifiers"]
    (requirement,) = of_pip["pip"]
    folder, extras = re.fullmatch(r"(.*)\[(.*)\]", requirement).groups()
    assert (path.parent / folder).resolve() == ROOT
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.slow
def test_snakemake_imputes_every_sample(counts, store_of, tmp_path):
    needs(shutil.which("snakemake"), "snakemake")
    (tmp_path / "samples").mkdir()
    for name in ("a", "b"):
        shutil.copy(store_of(counts, f"{name}.h5ad"), tmp_path / "samples")
    rules = DEPLOY / "snakemake" / "Snakefile"
    for expected in ("2 of 2 jobs|3 of 3 steps", "Nothing to be done"):
        done = subprocess.run(
            ["snakemake", "--snakefile", rules, "--cores", "2"],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | OURS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.search(expected, done.stdout + done.stderr)
    for name in ("a", "b"):
        assert scialm_dask.Imputation.open(tmp_path / "imputed" / f"{name}.zarr").shape == counts.shape


def test_the_services_are_those_of_the_specification():
    path = DEPLOY / "docker" / "compose.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    services = yaml.safe_load(path.read_text())["services"]
    assert set(services) >= {"scheduler", "worker", "jupyter"}
    assert services["worker"]["deploy"]["replicas"] == 2
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_what_workers_spill_is_on_disk():
    """A named volume: what is written to a tmpfs counts against the memory of the container."""
    composed = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    worker = composed["services"]["worker"]
    words = shlex.split(worker["command"])
    folder = words[words.index("--local-directory") + 1]
    mounted = {target: name for name, target in (volume.split(":") for volume in worker["volumes"])}
    assert mounted[folder] in composed["volumes"]
    assert not any(folder.startswith(temporary) for temporary in worker["tmpfs"])
    assert worker["cap_drop"] == ["ALL"]
    # a new volume has the owner of the folder in the image, and nobody else may write there
    assert re.search(
        rf"mkdir [^&]*{folder}\b.*chown scialm [^&]*{folder}\b", (DEPLOY / "docker" / "Dockerfile").read_text()
    )


def strict(schema):
    """Refuse what the schema does not name; Kubernetes would drop it in silence."""
    if isinstance(schema, dict):
        closed = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            closed.setdefault("additionalProperties", False)
        return closed
    return [strict(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=named)
def test_the_operator_takes_it(path):
    operator = Path(sys.prefix) / "share" / "dask-kubernetes" / "dask_kubernetes" / "operator" / "deployment" / "helm"
    needs(operator.is_dir(), "dask-kubernetes, for the operator's schemas,")
    document = yaml.safe_load(path.read_text())
    crd = operator / "dask-kubernetes-operator" / "crds" / f"{document['kind'].lower()}.yaml"
    (version,) = yaml.load(crd.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    jsonschema.validate(document, schema)
    spec = document["spec"].get("cluster", document)["spec"]
    name = document["metadata"]["name"]
    assert spec["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
    addresses = [word for words in commands_of_kubernetes(document) for word in words if word.startswith("tcp://")]
    assert all(address == f"tcp://{name}-scheduler:8786" for address in addresses)
    for part in ("worker", "scheduler"):
        assert spec[part]["spec"]["securityContext"]["runAsNonRoot"]


# JupyterHub


def test_the_kernel_is_one(tmp_path):
    from jupyter_client.kernelspec import KernelSpec

    shutil.copy(DEPLOY / "jupyterhub" / "kernel.json", tmp_path)
    spec = KernelSpec.from_resource_dir(str(tmp_path))
    assert spec.display_name == "scialm-dask"
    assert spec.argv[1:] == ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
    importlib.metadata.version("ipykernel")


def test_a_user_installs_a_kernel_of_their_own(tmp_path):
    (command,) = re.findall(
        r"`python (-m ipykernel install --user .*?)`", (DEPLOY / "README.md").read_text(), re.DOTALL
    )
    words = shlex.split(command.replace("--user", f"--prefix {tmp_path}"))
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    spec = json.loads((tmp_path / "share/jupyter/kernels/scialm/kernel.json").read_text())
    assert spec["argv"][0] == sys.executable
    assert spec["display_name"] == "scialm-dask"


def test_the_dashboard_is_reached_through_the_proxy(monkeypatch):
    settings = yaml.safe_load((DEPLOY / "jupyterhub" / "dask.yaml").read_text())
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    with dask.config.set({"distributed.dashboard.link": settings["distributed"]["dashboard"]["link"]}):
        assert distributed.utils.format_dashboard_link("127.0.0.1", 8787) == "/user/ada/proxy/8787/status"
    ours = yaml.safe_load((Path(scialm_dask.__file__).parent / "scialm.yaml").read_text())["scialm"]
    assert set(settings["scialm"]) <= set(ours)
    factory = settings["labextension"]["factory"]
    kind = getattr(importlib.import_module(factory["module"]), factory["class"])
    assert issubclass(kind, distributed.deploy.Cluster)
    assert set(settings["labextension"]) <= {"factory", "default", "initial"}


def test_the_readme_names_every_file():
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            relative = path.relative_to(DEPLOY)
            assert str(relative) in text or f"{relative.parts[0]}/" in text, relative
