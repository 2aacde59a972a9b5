from __future__ import annotations

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.launcher import adopt_slurm, check_ranks, first_node, node_number, restart_count
from mindspeed_lora.errors import Failed

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_ranks_of_srun() -> None:
    environ = dict(SRUN)
    adopt_slurm(environ)
    assert environ["RANK"] == "3" and environ["WORLD_SIZE"] == "4" and environ["LOCAL_RANK"] == "1"
    assert environ["MASTER_ADDR"] == "gpu07" and environ["MASTER_PORT"] == "24711"


@pytest.mark.parametrize(
    "environ",
    [
        {**SRUN, "RANK": "0"},  # torchrun, started by srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # the script of sbatch itself
        {},
    ],
)
def test_no_ranks_of_srun(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_an_address_that_is_given_stays() -> None:
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "x"}, "RANK=x in the environment: expected a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 .* WORLD_SIZE=2: ranks count from 0 to 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* no RANK, no MASTER_ADDR, no MASTER_PORT; start .* torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "no MASTER_ADDR; start"),
    ],
)
def test_what_is_no_world_of_ranks(environ: dict[str, str], told: str) -> None:
    with pytest.raises(Failed, match=told):
        check_ranks(environ)
    check_ranks({})
    check_ranks({"RANK": "0", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[01-04,07],login1", "gpu01"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]-node[05-08]", "rack1-node05"),
        ("n[1-2].cluster.org,m1", "n1.cluster.org"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_the_number_of_the_node() -> None:
    assert node_number({"GROUP_RANK": "1", "SLURM_NODEID": "0"}) == "1"
    assert node_number({"SLURM_NODEID": "2"}) == "2"
    assert node_number({}) is None


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_resumes(name: str) -> None:
    words = ["--data-path", "rows", "--lora-r", "4"]
    assert restart_count({name: "2"}) == 2
    job = parse("posttrain", [*words, "--save", "run", "--overwrite"], {name: "1"})
    assert job.checkpoint.resume == "auto" and any("restart 1" in notice for notice in job.notices)
    assert parse("posttrain", [*words, "--save", "run"], {name: "0"}).checkpoint.resume is None
    assert parse("posttrain", [*words, "--save", "run"], {name: ""}).checkpoint.resume is None
    assert parse("posttrain", words, {name: "1"}).checkpoint.resume is None, "nothing is saved"
