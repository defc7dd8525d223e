"""What lies in deploy/ is well-formed and does what it says, as far as that shows without Docker, Slurm or Ansible; and
every command on docs/deploy.md exists, with its options."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fastweight import cli

ROOT = Path(__file__).parent.parent
DEPLOY, PAGE = ROOT / "deploy", ROOT / "docs" / "deploy.md"
DOCKERFILE, PLAYBOOK = DEPLOY / "Dockerfile", DEPLOY / "ansible" / "workers.yml"


# ---- the page --------------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """Every line of the page's shell blocks, as words; environment before the command is left out."""
    found = []
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z]+=.*", words[0]):
                words.pop(0)
            found += [words] if words else []
    return found


def help_of(words: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert not end.value.code, words
    return capsys.readouterr().out


OURS = [words[words.index("fastweight") :] for words in commands() if "fastweight" in words and "docker" not in words]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_fastweight_command_of_the_page_has_its_options(words, capsys, monkeypatch):
    depth = {"data": 2, "diloco": 2, "train": 2}.get(words[1], 1) + (words[1:3] == ["diloco", "init"])
    told = help_of(words[1 : depth + 1], capsys, monkeypatch)
    options = [word for word in words if word.startswith("--") and word != "--resume"]
    missing = [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}\b", told)]
    assert not missing


def test_the_page_uses_nothing_but_these_programs():
    programs = {words[0] for words in commands()}
    assert programs == {"fastweight", "torchrun", "docker", "sbatch", "ansible-playbook", "pip", "cp"}
    assert len(OURS) > 15


def test_every_file_that_the_page_names_exists():
    for name in set(re.findall(r"deploy/[\w./-]*\w", PAGE.read_text())):
        assert (ROOT / name).is_file(), name


def test_what_docker_is_told_on_the_page_is_known_to_the_image():
    text = PAGE.read_text()
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.MULTILINE))
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= known
    script = (DEPLOY / "worker.sh").read_text()
    variables = set(re.findall(r" -e (\w+)=|`-e (\w+)=", text))
    for name in {a or b for a, b in variables}:
        assert re.search(rf"\$\{{?{name}\b", script), name


# ---- Docker ----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip() and not line.startswith("#")]


def test_the_image_has_arguments_before_their_use_a_user_and_an_entry_point():
    names = [name for name, _ in instructions()]
    assert set(names) <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
    assert names.index("FROM") == names.index("ARG") + 1
    known = {"PYTHON"}
    for name, rest in instructions():
        if name == "ARG":
            known.add(rest.split("=")[0])
        used = set(re.findall(r"\$\{([A-Z_]+)", rest)) if name in ("RUN", "FROM") else set()
        assert used <= known, rest
    (user,) = [rest for name, rest in instructions() if name == "USER"]
    assert user not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT") == len(names) - 1


def test_all_that_is_copied_into_the_image_exists_and_is_let_through():
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = [rest.split() for name, rest in instructions() if name == "COPY"]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize(
    ("device", "extras", "wanted"),
    [("gpu", "s3", ".[gpu,s3]"), ("cpu", "s3", ".[s3]"), ("cpu", "", "."), ("gpu", "", ".[gpu]"), ("tpu", "s3", None)],
)
def test_the_images_device_chooses_the_packages(tmp_path, device, extras, wanted):
    (run,) = [rest for name, rest in instructions() if name == "RUN" and "DEVICE" in rest]
    said = stand_in(tmp_path, "pip")
    environment = os.environ | {"DEVICE": device, "EXTRAS": extras, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", run], env=environment, capture_output=True, text=True, timeout=60)
    if wanted is None:
        assert (done.returncode, done.stderr.strip()) == (2, "DEVICE must be cpu or gpu, got tpu")
    else:
        assert said.read_text().splitlines() == [f"pip install {wanted}"]


# ---- scripts ---------------------------------------------------------------------------------------------------------


def stand_in(folder: Path, name: str, then: str = "") -> Path:
    """A program `name` that writes down how it was called, and then does `then`. Returns where it writes."""
    said, program = folder / "said", folder / name
    program.write_text(f'#!/bin/bash\necho {name} "$@" >> {said}\n{then}\n')
    program.chmod(0o755)
    return said


@pytest.mark.parametrize("script", ["worker.sh", "train.slurm"])
def test_scripts_are_shell(script):
    shell = (DEPLOY / script).read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", str(DEPLOY / script)], check=True, timeout=60)
    assert os.access(DEPLOY / script, os.X_OK) == (script == "worker.sh")


def run_worker(folder: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = [str(DEPLOY / "worker.sh"), *arguments]
    return subprocess.run(command, env=path | environment, capture_output=True, text=True, timeout=60)


def test_a_worker_is_told_by_its_environment(tmp_path):
    said = stand_in(tmp_path, "fastweight")
    run_worker(tmp_path, [], FOLDER="s3://b/a run", STORE="/store", WORKER="alice", KEYS="/k.json", DEVICE="cpu")
    run_worker(tmp_path, [], FOLDER="/run", STORE="/store")
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    assert said.read_text().splitlines() == [
        "fastweight diloco learn s3://b/a run --worker alice --store /store --device cpu --keys /k.json",
        f"fastweight diloco learn /run --worker {host} --store /store --device auto",
    ]


def test_a_worker_runs_another_command_or_says_what_is_missing(tmp_path):
    said = stand_in(tmp_path, "fastweight", "exit 7")
    assert run_worker(tmp_path, ["fastweight", "doctor"]).returncode == 7
    assert said.read_text() == "fastweight doctor\n"
    done = run_worker(tmp_path, [], FOLDER="/run")
    assert (done.returncode, "set STORE" in done.stderr) == (2, True)


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for Slurm and torchrun; starts the job script and returns its process, and what was called."""
    programs, out = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    said = stand_in(programs, "scontrol", 'if [ "$1" = show ]; then echo node1; echo node2; fi')
    stand_in(
        programs,
        "srun",
        "shift; trap 'kill -TERM $child' TERM; \"$@\" & child=$!; "
        "while kill -0 $child 2>/dev/null; do wait $child; code=$?; done; exit $code",
    )
    step = f"mkdir -p {out}; echo step-000001 > {out}/latest; touch {tmp_path}/ready"
    # After a signal torchrun exits with 1, whatever its processes exit with.
    training = f"trap '{step}; exit 1' TERM; touch {tmp_path}/ready; for i in $(seq 200); do sleep 0.1; done"
    asked = 'if [ "$1" = --help ]; then echo "  --shutdown-timeout S"; exit; fi'
    stand_in(
        programs,
        "torchrun",
        f"{asked}\nif [ -e {tmp_path}/ends ]; then touch {out}/result.json; exit 0; fi\n{training}",
    )

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        own = {"RECIPE": "tiny-hybrid", "STORE": "data/x", "OUT": str(out), "PATH": f"{programs}:{os.environ['PATH']}"}
        slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "17"}
        command = ["bash", str(DEPLOY / "train.slurm"), *arguments]
        with (tmp_path / "stderr").open("w") as stderr:
            started.append(subprocess.Popen(command, env=own | slurm | environment, stderr=stderr))
        return started[-1]

    started: list[subprocess.Popen] = []
    yield start, said, tmp_path
    for job in started:
        job.kill()
        job.wait(30)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_job_saves_is_queued_again_and_goes_on(cluster, number):
    start, said, folder = cluster
    job = start("--steps", "10000")
    wait_for(folder / "ready")
    job.send_signal(number)
    assert job.wait(30) == 143
    lines = said.read_text().splitlines()
    (training,) = [line for line in lines if line.startswith("torchrun --nnodes")]
    assert training.endswith(f"-m fastweight train tiny-hybrid --data.store data/x --out {folder}/run --steps 10000")
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-id 17-0 --rdzv-backend c10d --rdzv-endpoint node1:29500" in training
    assert "--shutdown-timeout 240" in training
    assert lines[-1] == "scontrol requeue 17"
    said.unlink()
    (folder / "ends").touch()
    assert start("--steps", "10000", SLURM_RESTART_COUNT="1").wait(30) == 0
    lines = said.read_text().splitlines()
    (training,) = [line for line in lines if line.startswith("torchrun --nnodes")]
    assert training.endswith(f"-m fastweight train --resume {folder}/run")
    assert "--rdzv-id 17-1" in training
    assert not any("requeue" in line for line in lines)


def test_a_job_without_its_settings_says_which(cluster):
    start, said, folder = cluster
    job = start(RECIPE="")
    assert job.wait(30) == 1
    assert "set RECIPE" in (folder / "stderr").read_text()
    assert not said.exists()


def test_the_batch_headers_ask_for_notice_and_requeue():
    headers = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (DEPLOY / "train.slurm").read_text(), re.MULTILINE)
    asked = dict(headers)
    assert (asked["signal"], asked["requeue"], asked["open-mode"], asked["ntasks-per-node"]) == (
        "B:USR1@300", "", "append", "1",
    )  # fmt: skip


# ---- Ansible ---------------------------------------------------------------------------------------------------------

# What each module must be given, from its documentation in ansible-core.
MODULES = {
    "package": {"name"}, "user": {"name"}, "file": {"path"}, "copy": {"dest"}, "pip": {"name", "virtualenv"},
    "stat": {"path"}, "assert": {"that"}, "template": {"src", "dest"}, "systemd": {"name", "state"},
}  # fmt: skip
KEYWORDS = {"name", "when", "tags", "register", "no_log"}


def plays() -> list[dict]:
    return yaml.safe_load(PLAYBOOK.read_text())


def test_every_task_has_a_name_and_a_module_of_ansible_itself_with_what_it_needs():
    for play in plays():
        assert {"name", "hosts", "tasks"} <= set(play) <= {"name", "hosts", "become", "tags", "vars", "tasks"}
        for task in play["tasks"]:
            (module,) = set(task) - KEYWORDS
            kind = module.removeprefix("ansible.builtin.")
            assert f"ansible.builtin.{kind}" == module
            assert MODULES[kind] <= set(task[module]), task["name"]
            if kind == "copy":
                assert {"src", "content"} & set(task[module])
            if "keys" in str(task.get("when")):
                assert task["no_log"] is True


def test_stopping_happens_only_when_it_is_asked_for():
    for play in plays()[1:]:
        states = {
            task["ansible.builtin.systemd"]["state"]: task["tags"]
            for task in play["tasks"]
            if "ansible.builtin.systemd" in task
        }
        assert states.pop("stopped") == ["never", "stop"]
        assert list(states.values()) == [["start"]]


def test_every_setting_has_a_default_or_stands_in_the_example():
    text = PLAYBOOK.read_text() + (DEPLOY / "ansible" / "service.j2").read_text()
    example = (DEPLOY / "ansible" / "hosts.example.ini").read_text()
    own = set(re.findall(r"register: (\w+)", text))
    for name in set(re.findall(r"\bfastweight_\w+", text)) - own:
        assert re.search(rf"{name} \| default", text) or re.search(rf"^(# )?{name}=", example, re.MULTILINE), name


def test_the_services_start_commands_that_exist(capsys, monkeypatch):
    template = (DEPLOY / "ansible" / "service.j2").read_text()
    assert "ExecStart={{ home }}/venv/bin/fastweight diloco {{ command }}" in template
    for play, command in zip(plays()[1:], ("sync", "learn"), strict=True):
        line = play["vars"]["command"]
        assert line.split()[0] == command
        told = help_of(["diloco", command], capsys, monkeypatch)
        for option in re.findall(r"--[a-z]+", line):
            assert option in told, option
        assert set(re.findall(r"{{ (\w+) }}", template)) <= {*play["vars"], "fastweight_folder"}


@pytest.mark.skipif(shutil.which("ansible-playbook") is None, reason="ansible-playbook is not installed")
def test_ansible_takes_the_playbook(tmp_path):
    inventory = DEPLOY / "ansible" / "hosts.example.ini"
    command = ["ansible-playbook", "--syntax-check", "-i", str(inventory), str(PLAYBOOK)]
    environment = os.environ | {"HOME": str(tmp_path), "ANSIBLE_LOCAL_TEMP": str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
