"""Pushing and loading back through the real client, in processes of their own, against a server on 127.0.0.1.

`server.py` is the server; it runs in this process: tests break its connections and read what it holds.
`client.py` is the process that pushes. A second client, which starts without hf_ext, is the reader.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_ext.core.files import tensor_header
from hf_ext.hub import _Content, push_to_hub

from .server import TOKEN, Fault, File, Hub

ROOT = Path(__file__).resolve().parents[2]
_LONGEST = 120.0  # seconds for one call, on a machine that does other things besides


class Failed(Exception):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class Client:
    """A process of `client.py`, asked one thing after the other."""

    def __init__(self, hub: Hub, folder: Path, name: str, **variables: str) -> None:
        self.log = folder / f"{name}.log"
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / f"{name}-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hub.client", str(folder)],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def ask(self, call: str, **given: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": call, **given}) + "\n")

    def answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], _LONGEST)
        line = self.process.stdout.readline() if ready else ""
        assert line, f"no answer\n{self.log.read_text()[-3000:]}"
        found = json.loads(line)
        if "error" in found:
            raise Failed(*found["error"])
        return found["value"]

    def call(self, call: str, **given: Any) -> Any:
        self.ask(call, **given)
        return self.answer()

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def reader(server: Hub, folder: Path) -> Iterator[Client]:
    client = Client(server, folder, "reader")
    yield client
    client.end()


@pytest.fixture(scope="module")
def pusher(server: Hub, folder: Path, reader: Client) -> Iterator[Client]:
    client = Client(server, folder, "pusher")
    yield client
    client.end()


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    """Return the server, without the faults of the test before."""
    server.faults.clear()
    yield server
    server.faults.clear()


@pytest.fixture(scope="module")
def base(pusher: Client) -> dict[str, Any]:
    return pusher.call("push_base")


@pytest.fixture(scope="module")
def adapter(pusher: Client, base: dict[str, Any]) -> dict[str, Any]:
    return pusher.call(
        "push_adapter",
        repo_id="me/sorsa",
        with_tokenizer=True,
        metrics={"eval_loss_after": 2.25, "accuracy": 0.5},
        settings={"learning_rate": 1e-3},
        log_history=[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}],
    )


@pytest.fixture(scope="module")
def plain(pusher: Client, base: dict[str, Any]) -> dict[str, Any]:
    return pusher.call("push_lora_and_merged")


@pytest.fixture(scope="module")
def saved(pusher: Client, base: dict[str, Any]) -> dict[str, Any]:
    """Return what a saved adapter computes, in `folder / "adapter"`; its base came from a folder."""
    return pusher.call("make_folders")


def card(hub: Hub, repo_id: str, branch: str = "main") -> tuple[dict[str, Any], str]:
    text = hub.head(repo_id, branch).files["README.md"].data.decode()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def names(hub: Hub, repo_id: str) -> set[str]:
    return set(hub.head(repo_id).files) - {".gitattributes"}


# Load back --------------------------------------------------------------------------------------------------


def test_an_export_and_a_merged_model_load_without_hf_ext(reader: Client, plain: dict[str, Any]) -> None:
    # First: the reader has not imported hf_ext before.
    lora = reader.call("load", repo_id="me/lora", how="plain")
    merged = reader.call("load", repo_id="me/merged", how="model")
    assert not lora["hf_ext"]
    assert not merged["hf_ext"]
    assert lora["values"] == pytest.approx(plain["values"], abs=1e-5)
    assert merged["digest"] == plain["merged"]["digest"]


@pytest.mark.parametrize("how", ["adapter", "auto"])
def test_an_adapter_loads_back_bit_for_bit(reader: Client, adapter: dict[str, Any], how: str) -> None:
    loaded = reader.call("load", repo_id="me/sorsa", how=how)
    assert loaded["digest"] == adapter["digest"] != adapter["base"]["digest"]
    assert loaded["type"] == "PeftModelForCausalLM"


def test_the_snippet_of_the_card_runs(hub: Hub, reader: Client, adapter: dict[str, Any]) -> None:
    _, body = card(hub, "me/sorsa")
    code = body.split("```python\n")[1].split("```")[0]
    assert "import hf_ext" in code
    found = reader.call("run_snippet", code=code)
    assert found["digest"] == adapter["digest"]
    assert found["tokens"]


def test_upstreams_own_push_of_our_adapter_loads_back(reader: Client, pusher: Client, base: Any) -> None:
    pushed = pusher.call("push_adapter", repo_id="me/upstream", upstream=True)
    assert reader.call("load", repo_id="me/upstream", how="auto")["digest"] == pushed["digest"]


def test_one_adapter_of_two_goes_to_a_branch_of_a_private_repository(
    hub: Hub, reader: Client, pusher: Client, base: Any
) -> None:
    pushed = pusher.call("push_trained")
    repository = hub.repositories["me/second"]
    assert repository.private
    assert len(repository.history("trial")) == 1
    assert repository.history("main") == []
    loaded = reader.call("load", repo_id="me/second", how="adapter", revision="trial")
    assert loaded["digest"] == pushed["digest"] != base["digest"]
    with pytest.raises(
        Failed, match=r"private must be True as the existing repository me/second is, or None"
    ):
        pusher.call("push_adapter", repo_id="me/second", private=False)


def test_an_adapter_made_by_transformers_itself(hub: Hub, reader: Client, pusher: Client, base: Any) -> None:
    pushed = pusher.call("push_native")
    assert pushed["active"] == ["other"]
    assert card(hub, "me/native")[0]["base_model"] == "me/base"
    loaded = reader.call("load", repo_id="me/native", how="adapter")
    assert loaded["digest"] == pushed["digest"] != base["digest"]


def test_trl_pushes_each_checkpoint_and_the_end(hub: Hub, reader: Client, pusher: Client, base: Any) -> None:
    trained = pusher.call("train_with_trl")
    assert len(hub.repositories["me/sft"].history()) >= 2
    loaded = reader.call("load", repo_id="me/sft", how="auto")
    assert loaded["digest"] == trained["digest"] != base["digest"]


# The card ---------------------------------------------------------------------------------------------------


def test_the_card_as_the_server_received_it(hub: Hub, adapter: dict[str, Any]) -> None:
    data, body = card(hub, "me/sorsa")
    assert data["base_model"] == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert {"hf_ext", "sorsa"} <= set(data["tags"])
    assert "datasets" not in data
    (entry,) = data["model-index"]
    measured = {m["type"]: m["value"] for result in entry["results"] for m in result["metrics"]}
    assert measured == {"eval_loss_after": 2.25, "accuracy": 0.5}
    assert "sorsa" in body
    assert "| adapter.r | 4 |" in body
    assert "| learning_rate | 0.001 |" in body
    assert "loss.png" in body
    assert hub.head("me/sorsa").files["loss.png"].data.startswith(b"\x89PNG")


def test_the_cards_of_exports_and_models(hub: Hub, plain: dict[str, Any]) -> None:
    lora, lora_body = card(hub, "me/lora")
    assert (lora["library_name"], lora["base_model"]) == ("peft", "me/base")
    assert "import hf_ext" not in lora_body
    merged, merged_body = card(hub, "me/merged")
    assert (merged["library_name"], merged["base_model"]) == ("transformers", "me/base")
    assert merged["base_model_relation"] == "finetune"
    assert 'AutoModelForCausalLM.from_pretrained("me/merged")' in merged_body
    assert "sorsa, merged" in merged_body


@pytest.mark.parametrize(
    ("task_type", "auto_class", "task"),
    [
        ("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
        (None, "AutoModelForCausalLM", "text-generation"),
        ("SEQ_CLS", "AutoModelForSequenceClassification", "text-classification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification", "token-classification"),
        ("FEATURE_EXTRACTION", "AutoModel", None),
    ],
)
def test_the_card_of_an_adapter_says_what_its_task_type_does(
    task_type: str | None, auto_class: str, task: str | None, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": "org/base"
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    facts = _Content.read(tmp_path, None, None).facts("me/mine", None, {}, {}, None)
    assert facts.task == task
    assert f'base = {auto_class}.from_pretrained("org/base")' in facts.snippet
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    head = {"base_model.model.score.weight": torch.zeros(3, 8)}
    save_file(head, tmp_path / "adapter_model.safetensors")
    facts = _Content.read(tmp_path, None, None).facts("me/mine", None, {}, {}, None)
    assert (", num_labels=3)" in facts.snippet) == (task_type in ("SEQ_CLS", "TOKEN_CLS"))


def test_no_path_of_this_machine_is_pushed(
    hub: Hub, pusher: Client, folder: Path, saved: dict[str, Any]
) -> None:
    before = contents(folder / "adapter")
    assert saved["path"].encode() in before["README.md"]  # PEFT puts it there
    assert saved["path"].encode() in before["adapter_config.json"]
    pusher.call("push_folder", folder="adapter", repo_id="me/paths")
    files = hub.head("me/paths").files
    assert [name for name, file in files.items() if str(folder).encode() in file.data] == []
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] is None
    data, body = card(hub, "me/paths")
    assert "base_model" not in data
    assert "[More Information Needed]" not in body  # PEFT's template has become a card
    assert 'PeftModel.from_pretrained(base, "me/paths")' in body
    # Neither checkpoints nor pickles; of the rest, what lies there is sent, and the folder is as it was.
    assert set(files) - {".gitattributes"} == {
        n for n in before if not n.startswith(("checkpoint", "training"))
    }
    weights = "adapter_model.safetensors"
    assert (files[weights].data, files[weights].is_lfs) == (before[weights], True)
    assert contents(folder / "adapter") == before

    pusher.call(
        "push_folder", folder="adapter", repo_id="me/paths", base_model="me/base", metrics={"loss": 1}
    )
    files = hub.head("me/paths").files
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == "me/base"
    assert card(hub, "me/paths")[0]["base_model"] == "me/base"
    assert [name for name, file in files.items() if str(folder).encode() in file.data] == []


def test_a_folders_own_card_goes_up_but_for_the_path(
    hub: Hub, pusher: Client, folder: Path, saved: dict[str, Any]
) -> None:
    own = folder / "own-card"
    shutil.copytree(folder / "adapter", own)
    path = saved["path"]
    text = f"---\nlicense: mit\nbase_model: {path}\ntags:\n- base_model:adapter:{path}\n- mine\n---\n"
    (own / "README.md").write_text(f"{text}Made from {path} by hand.\n")
    pusher.call("push_folder", folder="own-card", repo_id="me/own-card")
    data, body = card(hub, "me/own-card")
    assert data == {"license": "mit", "tags": ["mine"]}
    assert body.strip() == "Made from local-base by hand."


def test_what_people_wrote_into_the_card_stays(hub: Hub, pusher: Client, adapter: dict[str, Any]) -> None:
    repository = hub.repositories["me/sorsa"]
    files = dict(hub.head("me/sorsa").files)
    text = files["README.md"].data.decode()
    text = text.replace("<!-- hf_ext -->", "Ask before use.\n\n<!-- hf_ext -->").replace(
        "---\n", "---\nlicense: mit\n", 1
    )
    files["README.md"] = File(text.encode(), False)
    repository.add("main", "edited on the site", files)
    since = len(hub.requests)
    pusher.call("push_adapter", repo_id="me/sorsa", metrics={"accuracy": 0.75})
    data, body = card(hub, "me/sorsa")
    assert data["license"] == "mit"
    assert body.count("Ask before use.") == 1
    assert body.count("## Load it") == 1
    (entry,) = data["model-index"]
    assert [m["value"] for r in entry["results"] for m in r["metrics"]] == [0.75]
    # The same weights again: asked for, and not sent.
    assert hub.sent("POST .*/objects/batch", since=since)
    assert hub.sent("PUT ", since=since) == []


def test_weights_of_another_kind_do_not_stay_to_be_loaded_instead(
    hub: Hub, pusher: Client, reader: Client, plain: dict[str, Any]
) -> None:
    pusher.call("push_folder", folder="lora", repo_id="me/changed")
    assert "adapter_config.json" in names(hub, "me/changed")
    pusher.call("push_folder", folder="merged", repo_id="me/changed")
    left = names(hub, "me/changed")
    assert not {name for name in left if name.startswith("adapter_")}
    loaded = reader.call("load", repo_id="me/changed", how="model")
    assert loaded["digest"] == plain["merged"]["digest"]


# Interruptions ----------------------------------------------------------------------------------------------

FAULTS = {
    "the connection breaks within a file": [Fault("PUT /lfs", "drop", after=9000)],
    "it breaks until huggingface_hub gives up": [Fault("PUT /lfs", "drop", times=6, after=9000)],
    "the storage answers 500 and 503": [
        Fault("PUT /lfs", "status", 2, status=500),
        Fault("PUT /lfs", "status", 2),
    ],
    "the batch call fails": [Fault("objects/batch", "status", times=2)],
    "the repository cannot be made at first": [Fault("repos/create", "drop")],
    "the card's check breaks": [Fault("validate-yaml", "drop")],
    "a proxy answers instead of the Hub": [Fault("validate-yaml", "status", status=502, message="<html>")],
    "the commit breaks before it is made": [Fault("/commit/main", "drop", after=100)],
    "the commit is answered by 503": [Fault("/commit/main", "status")],
    "the answer to the commit is lost": [Fault("/commit/main", "lost")],
}


@pytest.mark.parametrize("what", FAULTS)
def test_an_interrupted_push_ends_whole_and_in_one_commit(
    hub: Hub, pusher: Client, folder: Path, saved: Any, what: str
) -> None:
    repo_id = f"me/fault-{list(FAULTS).index(what)}"
    hub.blobs.clear()  # so that there is something to send
    hub.faults += [replace(fault) for fault in FAULTS[what]]
    url = pusher.call("push_folder", folder="adapter", repo_id=repo_id, base_model="me/base")
    assert [fault.hits for fault in hub.faults] == [fault.times for fault in hub.faults]
    (commit,) = hub.repositories[repo_id].history()
    assert url == f"{hub.endpoint}/{repo_id}/commit/{commit.sha}"
    local = contents(folder / "adapter")
    own = {"README.md", "adapter_config.json", ".gitattributes"}  # the path of the base is taken out of these
    assert {n: f.data for n, f in commit.files.items() if n not in own} == {
        n: data for n, data in local.items() if n in commit.files and n not in own
    }
    assert own < set(commit.files)
    assert "adapter_model.safetensors" in commit.files


def test_a_rivals_commit_is_not_lost(hub: Hub, pusher: Client, saved: Any) -> None:
    hub.faults.append(Fault("/commit/main", "rival"))
    pusher.call("push_folder", folder="adapter", repo_id="me/rival")
    ours, theirs = hub.repositories["me/rival"].history()
    assert theirs.message == "a rival's commit"
    assert ours.files["rival.txt"] == theirs.files["rival.txt"]
    assert [status for _, status in hub.sent("POST .*me/rival/commit")] == [412, 200]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault("PUT /lfs", "drop", times=1000, after=9000),
            ["adapter_model.safetensors", "after 2 attempts", "unchanged", "Push again"],
        ),
        (
            Fault("PUT /lfs", "status", times=1000, status=403, message="storage is full"),
            ["adapter_model.safetensors", "403", "storage is full", "unchanged", "hf auth login"],
        ),
        (
            Fault("/commit/main", "status", times=1000, status=500, message="out of order"),
            ["the commit", "after 2 attempts", "500", "out of order", "unchanged"],
        ),
        (
            Fault("/commit/main", "drop", times=1000),
            ["the commit", "after 2 attempts", "what it held before, or the whole push"],
        ),
    ],
    ids=["broken", "refused", "commit-500", "commit-broken"],
)
def test_a_push_that_fails_for_good_changes_nothing(
    hub: Hub, pusher: Client, folder: Path, saved: Any, fault: Fault, words: list[str]
) -> None:
    if "me/permanent" not in hub.repositories:
        pusher.call("push_folder", folder="adapter", repo_id="me/permanent")
    there, here = hub.head("me/permanent"), contents(folder / "adapter")
    changed = folder / "changed"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(folder / "adapter", changed)
    weights = bytearray((changed / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "adapter_model.safetensors").write_bytes(weights)
    hub.blobs.clear()
    hub.faults.append(replace(fault))
    with pytest.raises(Failed) as failed:
        pusher.call("push_folder", folder="changed", repo_id="me/permanent", attempts=2)
    assert failed.value.kind == "PushError"
    assert [word for word in ("me/permanent", *words) if word not in failed.value.text] == []
    assert "\n" not in failed.value.text
    assert hub.head("me/permanent") is there
    assert contents(folder / "adapter") == here
    tries = len(hub.sent(fault.pattern, since=len(hub.requests) - 40))
    assert tries >= (1 if fault.status == 403 else 2)


def test_a_killed_push_leaves_the_repository_and_is_taken_up_again(
    hub: Hub, reader: Client, pusher: Client, folder: Path, saved: dict[str, Any]
) -> None:
    whole = {"folder": "twice", "repo_id": "me/killed", "base_model": "me/base", "commit_message": "all"}
    twice = folder / "twice"
    shutil.copytree(folder / "adapter", twice)
    shutil.copy(folder / "local-base" / "model.safetensors", twice / "extra.safetensors")
    pusher.call("push_folder", folder="adapter", repo_id="me/killed", base_model="me/base")
    there = hub.head("me/killed")
    hub.blobs.clear()
    hub.faults.append(Fault("PUT /lfs", "hold", after=20_000))
    client = Client(hub, folder, "killed")
    try:
        client.ask("push_folder", **whole)
        assert hub.held.wait(timeout=_LONGEST)
        client.process.send_signal(signal.SIGKILL)
        assert client.process.wait(timeout=20) == -signal.SIGKILL
    finally:
        hub.release.set()
        client.end()
    assert hub.head("me/killed") is there
    pusher.call("push_folder", **whole)
    assert [commit.message for commit in hub.repositories["me/killed"].history()] == ["all", "Upload sorsa"]
    extra = hub.head("me/killed").files["extra.safetensors"].data
    assert extra == (twice / "extra.safetensors").read_bytes()
    assert reader.call("load", repo_id="me/killed", how="auto")["digest"] == saved["digest"]


def test_nothing_changed_makes_no_commit(hub: Hub, pusher: Client, saved: Any) -> None:
    first = pusher.call("push_folder", folder="adapter", repo_id="me/same")
    assert pusher.call("push_folder", folder="adapter", repo_id="me/same") == first
    assert len(hub.repositories["me/same"].history()) == 1


# Refusals ---------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_said_and_not_shown(hub: Hub, pusher: Client, saved: Any) -> None:
    with pytest.raises(Failed, match=r"me/token.*401.*hf auth login") as failed:
        pusher.call("push_folder", folder="adapter", repo_id="me/token", token="hf_wrong")
    assert failed.value.kind == "PushError"
    assert "hf_wrong" not in failed.value.text
    assert "me/token" not in hub.repositories


def test_an_account_of_somebody_else_is_refused_at_once(hub: Hub, pusher: Client, saved: Any) -> None:
    since = len(hub.requests)
    with pytest.raises(Failed, match=r"you/adapter.*403"):
        pusher.call("push_folder", folder="adapter", repo_id="you/adapter")
    assert len(hub.sent("repos/create", since=since)) == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("truncated", r"adapter_model\.safetensors is damaged: \d+ bytes where its header says \d+"),
        ("no weights", r"model_or_folder must be a folder with weights"),
        ("empty", r"model_or_folder must be a folder with an adapter_config\.json or a config\.json"),
        ("missing", r"model_or_folder must be a model or an existing folder"),
        ("shard", r"model\.safetensors\.index\.json must be complete; .*model-00002-of-00002\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_before_any_request(
    hub: Hub, pusher: Client, folder: Path, saved: Any, damage: str, text: str
) -> None:
    damaged = folder / damage.replace(" ", "-")
    if damage != "missing":
        damaged.mkdir()
    if damage in ("truncated", "no weights"):
        shutil.copy(folder / "adapter" / "adapter_config.json", damaged)
    if damage == "truncated":
        data = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        (damaged / "adapter_model.safetensors").write_bytes(data[:-100])
    if damage == "shard":
        (damaged / "config.json").write_text("{}")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        shutil.copy(folder / "local-base" / "model.safetensors", damaged / shards["a"])
    since = len(hub.requests)
    with pytest.raises(Failed, match=text) as failed:
        pusher.call("push_folder", folder=damaged.name, repo_id="me/damaged")
    assert failed.value.kind == "ValueError"
    assert hub.requests[since:] == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"repo_id": "a/b/c"}, "repo_id must be 'owner/name', got 'a/b/c'"),
        ({"repo_id": "../adapter"}, "repo_id must be 'owner/name'"),
        ({"repo_id": ""}, "repo_id must be 'owner/name'"),
        ({"base_model": "/home/base"}, "base_model must be 'owner/name', got '/home/base'"),
        ({"metrics": {"loss": float("nan")}}, r"metrics\['loss'\] must be a finite number, got nan"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"wait": -1.0}, "wait must be at least 0"),
        ({}, "HF_HUB_OFFLINE must be unset for a push"),  # conftest sets it for this process
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        push_to_hub(tmp_path, **{"repo_id": "me/adapter", **given})


# The server itself ------------------------------------------------------------------------------------------


def _request(hub: Hub, method: str, path: str, body: bytes, token: str = TOKEN) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(hub.endpoint + path, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_refuses_what_the_hub_refuses(hub: Hub, saved: Any, folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    assert tensor_header(path)
    data, oid = path.read_bytes(), File(path.read_bytes(), True).oid
    hub.blobs.clear()
    assert _request(hub, "PUT", f"/lfs/{oid}", data[:-1]) == 400
    assert _request(hub, "POST", "/api/repos/create", b'{"name": "raw"}', token="other") == 401
    assert _request(hub, "POST", "/api/repos/create", b'{"name": "raw"}') == 200

    def commit(*entries: dict[str, Any], parent: str | None = None) -> int:
        header = {"key": "header", "value": {"summary": "raw", "description": "", "parentCommit": parent}}
        body = b"\n".join(json.dumps(entry).encode() for entry in (header, *entries))
        return _request(hub, "POST", "/api/models/me/raw/commit/main", body)

    weights = {
        "key": "lfsFile",
        "value": {"path": "a.safetensors", "oid": oid, "size": len(data), "algo": "sha256"},
    }
    assert commit(weights) == 400
    assert _request(hub, "PUT", f"/lfs/{oid}", data) == 200
    assert commit(weights, parent="0" * 40) == 412
    # base64 of a card with a path as base model
    text = "LS0tCmJhc2VfbW9kZWw6IC90bXAvYmFzZQotLS0K"
    assert (
        commit({"key": "file", "value": {"path": "README.md", "content": text, "encoding": "base64"}}) == 400
    )
    assert hub.repositories["me/raw"].history() == []
    assert commit(weights, parent=hub.head("me/raw").sha) == 200
    assert hub.head("me/raw").files["a.safetensors"].data == data
