def test_it(on_slurm, tmp_path):
    script = tmp_path / "a.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --time=1\n#SBATCH --output=%j.log\nenv | grep SLURM; srun hostname\n")
    job = on_slurm.submit(script, cwd=tmp_path)
    assert on_slurm.finished(job) == "COMPLETED"
    print((tmp_path / f"{job}.log").read_text())
