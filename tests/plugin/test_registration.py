"""The plug-in's entry point: what it adds to vLLM, and that it never stops a vLLM that did not ask for it."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.tiny_pair import run_in_vllm, write_drafter, write_target
from vllm import ModelRegistry
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.worker.gpu import spec_decode

from qm_spec.config import ARCHITECTURE
from qm_spec.integrations.vllm_plugin import aux_states, compat, patches, register

pytestmark = pytest.mark.vllm

ENTRY_POINT = "qm_spec.integrations.vllm_plugin.register:register"
LOGGER = "vllm.plugins.qm_spec"
# What drafts, which a vLLM without a drafter needs nothing of.
DRAFTING = ("model", "session", "proposer", "speculator", "seeds")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def drafter(target: Path) -> Path:
    """The drafter that `qm_spec` finds for the target."""
    return write_drafter(target / "qm_spec", target, num_speculative_tokens=3)


@pytest.fixture(autouse=True)
def registered() -> None:
    register.register()


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What our logger was told; `caplog` hears it once, twice or never, as vLLM has set up logging."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger(LOGGER).addHandler(handler)
    yield records
    logging.getLogger(LOGGER).removeHandler(handler)


def make_args(target: Path, **arguments: Any) -> EngineArgs:
    return EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        **arguments,
    )


def parse(*arguments: str) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", "m", *arguments])


# Registering


def test_the_entry_point_is_installed() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="qm_spec")
    assert {point.value for point in points} == {ENTRY_POINT}


def test_registering_twice_changes_nothing() -> None:
    def state() -> tuple[Any, ...]:
        return (
            ModelRegistry.models[ARCHITECTURE],
            EngineArgs.add_cli_args,
            EngineArgs.create_speculative_config,
            spec_decode.init_speculator,
        )

    before = state()
    register.register()
    assert state() == before


def test_the_model_is_registered_by_name_only(tmp_path: Path) -> None:
    code = (
        "import sys, vllm.plugins as p; p.load_general_plugins(); from vllm import ModelRegistry; "
        f"m = ModelRegistry.models['{ARCHITECTURE}']; "
        f"drafting = [name for name in {DRAFTING} if f'qm_spec.integrations.vllm_plugin.{{name}}' in sys.modules]; "
        "print(m.module_name, m.class_name, drafting)"
    )
    done = run_in_vllm(code, tmp_path)
    expected = "qm_spec.integrations.vllm_plugin.model QuickMergeForCausalLM []"
    assert done.stdout.splitlines()[-1] == expected, done.stdout


def test_importing_the_entry_point_does_nothing() -> None:
    code = f"import sys, {ENTRY_POINT.partition(':')[0]}; print({{'vllm', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_error_while_registering_is_logged_and_goes_no_further(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(patch: compat.Patch) -> bool:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(compat, "apply", broken)
    register.register()
    (record,) = log
    assert record.levelno == logging.ERROR
    assert record.exc_info and "no such luck" in str(record.exc_info[1])


# Patches


def catalogue() -> list[compat.Patch]:
    modules = [importlib.import_module(found.name) for found in iter_modules(patches.__path__, f"{patches.__name__}.")]
    return [entry for module in modules for entry in vars(module).values() if isinstance(entry, compat.Patch)]


@pytest.mark.parametrize("found", iter_modules(patches.__path__), ids=lambda found: found.name)
def test_a_patch_stands_in_one_file_with_its_function(found: Any) -> None:
    module = importlib.import_module(f"{patches.__name__}.{found.name}")
    own = [entry for entry in vars(module).values() if isinstance(entry, compat.Patch)]
    assert own and all(entry.replacement.__module__ == module.__name__ for entry in own)


@pytest.mark.parametrize("patch", catalogue(), ids=lambda patch: patch.target.partition(":")[2])
def test_a_patch_says_why_and_until_when(patch: compat.Patch) -> None:
    assert all((patch.why, patch.how, patch.upstream, patch.delete_when))


@pytest.mark.parametrize("patch", catalogue(), ids=lambda patch: patch.target.partition(":")[2])
def test_a_patch_fits_the_installed_vllm(patch: compat.Patch) -> None:
    module, _, path = patch.target.partition(":")
    method = attrgetter(path)(importlib.import_module(module))
    assert tuple(inspect.signature(method).parameters) == patch.parameters


def test_a_method_is_patched_by_one_entry() -> None:
    targets = [patch.target for patch in catalogue()]
    assert len(set(targets)) == len(targets)


class Victim:
    """Stands for a class of vLLM."""

    def method(self, number: int) -> int:
        return number

    @staticmethod
    def static(number: int) -> int:
        return number

    @classmethod
    def of_class(cls, number: int) -> int:
        return number

    number = property(lambda self: 1)


def doubled(original: Callable[..., int]) -> Callable[..., int]:
    def method(*arguments: Any) -> int:
        return 2 * original(*arguments)

    return method


def make_patch(name: str, *parameters: str, module: str = __name__) -> compat.Patch:
    return compat.Patch(f"{module}:Victim.{name}", parameters, doubled, "why", "how", "none", "never")


@pytest.fixture
def victim(monkeypatch: pytest.MonkeyPatch) -> type[Victim]:
    names = ("method", "static", "of_class", "number")
    fresh = type("Victim", (), {name: Victim.__dict__[name] for name in names})
    monkeypatch.setattr(sys.modules[__name__], "Victim", fresh)
    return fresh


def test_a_patch_is_applied_once(victim: Any) -> None:
    patch = make_patch("method", "self", "number")
    assert compat.apply(patch) and compat.apply(patch)
    assert victim().method(1) == 2


def test_a_static_method_stays_static(victim: Any) -> None:
    patch = make_patch("static", "number")
    assert compat.apply(patch) and compat.apply(patch)
    assert victim.static(1) == victim().static(1) == 2


def test_a_class_method_stays_one(victim: Any) -> None:
    patch = make_patch("of_class", "cls", "number")
    assert compat.apply(patch) and compat.apply(patch)
    assert victim.of_class(1) == victim().of_class(1) == 2


def test_a_patch_holds_where_a_later_version_has_more_parameters(victim: Any) -> None:
    patch = replace(make_patch("method", "self"), later=("number",))
    assert compat.apply(patch)
    assert victim().method(1) == 2
    assert not compat.apply(replace(make_patch("static"), later=("number", "more")))


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (make_patch("method", "self", "number", "more"), "its parameters are ('self', 'number')"),
        (make_patch("gone", "self"), "there is no such method"),
        (make_patch("number", "self"), "it is no method"),
        (make_patch("method", "self", "number", module="no.such.module"), "there is no such method"),
    ],
    ids=["other parameters", "gone", "no method", "no module"],
)
def test_what_a_patch_was_not_written_for_is_left_alone(
    patch: compat.Patch, reason: str, victim: Any, log: list[logging.LogRecord]
) -> None:
    assert not compat.apply(patch)
    assert victim().method(1) == 1
    (record,) = log
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage() and "supports 0.32 to 0.33" in record.getMessage()


def test_without_resolution_there_is_no_flag_and_one_warning(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_speculative_config(self: Any, something_else: Any) -> None: ...

    def add_cli_args(parser: Any) -> Any: ...

    monkeypatch.setattr(EngineArgs, "create_speculative_config", create_speculative_config)
    monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(add_cli_args))
    register.register()
    assert EngineArgs.create_speculative_config is create_speculative_config
    assert EngineArgs.add_cli_args is add_cli_args
    assert [record.levelno for record in log] == [logging.WARNING]


# The flag


@pytest.mark.parametrize("flag", ["--speculative-model", "--speculative_model", "--spec-model"])
def test_every_spelling_sets_the_draft_model(flag: str) -> None:
    for _ in range(2):
        assert parse(flag, "qm_spec").spec_model == "qm_spec"
    assert parse(f"{flag}=qm_spec").spec_model == "qm_spec"


def test_an_abbreviation_means_what_it_did_before_our_flag() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 2}
    for flag in ("--speculative", "--speculative-", "--speculative-c"):
        assert parse(flag, json.dumps(config)).speculative_config == config
        assert parse(f"{flag}={json.dumps(config)}").speculative_config == config
    assert parse("--speculative-m", "qm_spec").spec_model == "qm_spec"


def test_without_the_flag_there_is_no_draft_model() -> None:
    args = AsyncEngineArgs.from_cli_args(parse())
    assert (args.spec_model, args.spec_method, args.spec_tokens, args.speculative_config) == (None,) * 4


def test_a_flag_of_vllms_own_is_kept() -> None:
    import argparse

    from qm_spec.integrations.vllm_plugin.patches.flag import with_flag

    def original(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--speculative-model", dest="theirs")
        return parser

    parsed = with_flag(original)(argparse.ArgumentParser()).parse_args(["--speculative-model", "x"])
    assert vars(parsed) == {"theirs": "x"}


def test_vllm_serve_lists_the_flag(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("vllm")
    done = subprocess.run([program, "serve", "--help=speculative-model"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--speculative-model" in done.stdout and "QuickMerge drafter" in done.stdout


# Resolution, with vLLM's whole configuration


@pytest.mark.parametrize(
    ("arguments", "depth"),
    [
        ({"spec_model": "qm_spec"}, 3),
        ({"spec_model": "DRAFTER"}, 3),
        ({"spec_model": "qm_spec", "spec_method": "eagle3", "spec_tokens": 5}, 5),
        ({"speculative_config": {"model": "qm_spec"}}, 3),
        ({"speculative_config": {"method": "eagle3", "model": "DRAFTER", "num_speculative_tokens": 2}}, 2),
        ({"spec_model": "qm_spec", "speculative_config": {"num-speculative-tokens": 6}}, 6),
    ],
    ids=["word", "folder", "flags", "word in config", "folder in config", "flag and config"],
)
def test_every_way_of_asking_gives_the_same_engine(
    arguments: dict[str, Any], depth: int, target: Path, drafter: Path
) -> None:
    arguments = json.loads(json.dumps(arguments).replace("DRAFTER", str(drafter)))
    speculative = make_args(target, **arguments).create_engine_config().speculative_config
    assert speculative.method == "eagle3"
    assert speculative.model == str(drafter)
    assert speculative.num_speculative_tokens == depth
    assert speculative.disable_eagle_block_drop
    assert speculative.draft_model_config.architecture == ARCHITECTURE
    # The target's length decides, never the drafter's.
    assert speculative.draft_model_config.max_model_len == 128 + speculative.num_speculative_tokens


def test_the_library_call_gives_what_the_flag_gives(target: Path, drafter: Path) -> None:
    import qm_spec

    by_call = make_args(target, speculative_config=qm_spec.speculative_config(target)).create_engine_config()
    by_flag = make_args(target, spec_model="qm_spec").create_engine_config()
    for name in ("method", "model", "num_speculative_tokens", "disable_eagle_block_drop"):
        assert getattr(by_call.speculative_config, name) == getattr(by_flag.speculative_config, name)


@pytest.mark.parametrize(
    ("asked", "most", "of_prior"), [(None, 16, 3), (2, 2, 2), (7, 7, 7)], ids=["no number", "fewer", "more"]
)
def test_lookup_drafts_more_than_the_prior_unless_a_number_is_named(
    asked: int | None, most: int, of_prior: int, target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QM_SPEC_LOOKUP", "4")
    speculative = make_args(target, spec_model="qm_spec", spec_tokens=asked).create_engine_config().speculative_config
    assert speculative.num_speculative_tokens == most
    # Drafts may reach beyond a request's end.
    assert speculative.draft_model_config.max_model_len == speculative.target_model_config.max_model_len + most
    # What the model reads.
    assert speculative.draft_model_config.hf_config.model.num_speculative_tokens == of_prior


def test_with_lora_the_default_number_leaves_room_for_all_requests(
    target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QM_SPEC_LOOKUP", "4")
    # vLLM refuses 17 tokens for each of 128 requests here.
    args = make_args(target, spec_model="qm_spec", enable_lora=True, max_num_seqs=128, max_num_batched_tokens=2048)
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 3


def test_asynchronous_engines_resolve_too(target: Path, drafter: Path) -> None:
    args = AsyncEngineArgs.from_cli_args(parse("--speculative-model", "qm_spec"))
    args.model, args.skip_tokenizer_init, args.dtype, args.max_model_len = str(target), True, "float32", 128
    assert args.create_engine_config().speculative_config.model == str(drafter)


def test_arguments_can_be_used_again(target: Path, drafter: Path) -> None:
    given = {"model": "qm_spec", "num_speculative_tokens": 2}
    args = make_args(target, speculative_config=given, spec_method="eagle3")
    depths = [args.create_engine_config().speculative_config.num_speculative_tokens for _ in range(2)]
    assert depths == [2, 2]
    assert given == {"model": "qm_spec", "num_speculative_tokens": 2}
    assert (args.spec_method, args.spec_model, args.speculative_config) == ("eagle3", None, given)


def test_settings_that_a_user_made_are_kept(target: Path, drafter: Path) -> None:
    given = {"model": "qm_spec", "disable_eagle_block_drop": False, "draft_sample_method": "greedy"}
    speculative = make_args(target, speculative_config=given).create_engine_config().speculative_config
    assert speculative.disable_eagle_block_drop is False
    assert speculative.draft_sample_method == "greedy"


def test_with_the_v2_runner_a_step_drafts_what_the_prior_was_trained_for(
    target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qm_spec.integrations.vllm_plugin import request

    monkeypatch.setenv("QM_SPEC_LOOKUP", "4")
    depths = {}
    for runs_v2 in (False, True):
        monkeypatch.setattr(request, "_runs_v2", lambda runs_v2=runs_v2: runs_v2)
        args = make_args(target, speculative_config={"model": "qm_spec"})
        depths[runs_v2] = args.create_engine_config().speculative_config.num_speculative_tokens
    assert depths == {False: 16, True: 3}


@pytest.mark.parametrize(
    ("settings", "most"), [({}, 16), ({"enable_adaptive_verification": False}, 3), ({"num_speculative_tokens": 2}, 2)]
)
def test_where_the_v2_runner_chooses_what_to_verify_lookup_drafts_more_than_the_prior(
    settings: dict[str, Any],
    most: int,
    target: Path,
    drafter: Path,
    log: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qm_spec.integrations.vllm_plugin import request

    monkeypatch.setenv("QM_SPEC_LOOKUP", "4")
    config = make_args(target).create_engine_config()
    monkeypatch.setattr(request, "_runs_v2", lambda: True)
    args = make_args(target, speculative_config={"model": "qm_spec", "enable_adaptive_verification": True, **settings})
    # The whole engine's config is refused without CUDA graphs.
    speculative = args.create_speculative_config(config.model_config, config.parallel_config)
    assert speculative.num_speculative_tokens == most
    of_prior = min(most, 3)
    assert speculative.draft_model_config.hf_config.model.num_speculative_tokens == of_prior
    (said,) = [record.getMessage() for record in log if "tokens per step" in record.getMessage()]
    assert f"up to {most} tokens per step, {of_prior} by the prior and {most} copied by lookup" in said


@pytest.mark.parametrize(
    ("of_target", "of_drafter"),
    [("auto", "safetensors"), ("safetensors", "safetensors"), ("sharded_state", "safetensors"), ("dummy", None)],
)
def test_the_drafter_is_read_as_safetensors_whatever_the_targets_format(
    of_target: str, of_drafter: str | None, target: Path, drafter: Path
) -> None:
    config = make_args(target, spec_model="qm_spec", load_format=of_target).create_engine_config()
    assert config.load_config.load_format == of_target
    assert getattr(config.speculative_config.draft_load_config, "load_format", None) == of_drafter


def test_a_drafter_runs_no_code_and_is_read_as_a_folder_whatever_the_target(target: Path, drafter: Path) -> None:
    config = make_args(target, spec_model="qm_spec", trust_remote_code=True, config_format="hf").create_engine_config()
    drafters = config.speculative_config.draft_model_config
    assert (drafters.trust_remote_code, drafters.config_format) == (False, "auto")
    assert (config.model_config.trust_remote_code, config.model_config.config_format) == (True, "hf")
    assert config.speculative_config.target_model_config is config.model_config


@pytest.mark.parametrize("method", [None, "eagle3"])
def test_a_drafter_that_nothing_has_checked_is_refused(
    method: str | None, target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qm_spec.integrations.vllm_plugin import request

    # A hub id is known only when vLLM has read its config; a folder that is not recognised stands for it.
    monkeypatch.setattr(request, "is_drafter", lambda model: False)
    args = make_args(target, spec_model=str(drafter), spec_method=method, spec_tokens=2)
    with pytest.raises(ValueError, match=r"must be a local folder.*hf download .*--local-dir DIR"):
        args.create_engine_config()


@pytest.mark.parametrize("asked", [False, True])
def test_the_runner_that_is_asked_for_is_known(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from qm_spec.integrations.vllm_plugin import request

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(asked)))
    assert request._runs_v2() is asked


def test_drafts_are_drawn_on_a_cpu_where_verification_can_weigh_them(
    target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def method(**settings: Any) -> str:
        args = make_args(target, speculative_config={"model": "qm_spec", **settings})
        return args.create_engine_config().speculative_config.draft_sample_method

    assert method() == "probabilistic"
    assert method(rejection_sample_method="block") == "greedy"
    assert method(use_local_argmax_reduction=True) == "greedy", "vLLM takes no distributions then"


@pytest.mark.parametrize("asked", [None, "greedy", "probabilistic"])
@pytest.mark.parametrize(("max_num_seqs", "fits"), [(10, True), (11, False), (None, False)])
def test_drafts_are_drawn_on_a_gpu_where_their_distributions_fit(
    max_num_seqs: int | None,
    fits: bool,
    asked: str | None,
    target: Path,
    drafter: Path,
    log: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the user says. Without a number of requests vLLM's own default counts, which it sets later."""
    from vllm.platforms import current_platform

    from qm_spec.integrations.vllm_plugin import request

    args = make_args(
        target,
        speculative_config={"model": "qm_spec"} | ({"draft_sample_method": asked} if asked else {}),
        max_num_seqs=max_num_seqs,
    )
    vocabulary = json.loads((target / "config.json").read_text())["vocab_size"]
    monkeypatch.setattr(request, "MOST_DISTRIBUTION_BYTES", 10 * 3 * vocabulary * 4)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    drawn = "probabilistic" if fits else "greedy"
    method = args.create_engine_config().speculative_config.draft_sample_method
    assert method == (asked or drawn)
    texts = [record.getMessage() for record in log if "at a temperature above 0 drafts are" in record.getMessage()]
    assert len(texts) == (asked is None)
    if asked is None:
        assert ("drafts are drawn" in texts[0]) == fits and "draft_sample_method" in texts[0]


def test_a_setting_given_twice_is_left_for_vllm_to_refuse(target: Path, drafter: Path) -> None:
    args = make_args(target, spec_model="qm_spec", speculative_config={"model": "qm_spec"})
    with pytest.raises(ValueError, match="mutually exclusive"):
        args.create_engine_config()


def test_other_methods_pass_untouched(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked for a method that is not ours")

    monkeypatch.setattr(compat, "require_supported", refuse)
    assert make_args(target).create_engine_config().speculative_config is None
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    assert make_args(target, speculative_config=ngram).create_engine_config().speculative_config.method == "ngram"


@pytest.mark.parametrize(
    "model", ["org/name", "s3://bucket/key", "~no_such_user/x", "\0", "FOLDER", "BROKEN", None], ids=repr
)
def test_other_draft_models_are_not_ours(model: str | None, target: Path, tmp_path: Path) -> None:
    from qm_spec.integrations.vllm_plugin.request import find_request

    (tmp_path / "config.json").write_text("{")
    model = {"FOLDER": str(target), "BROKEN": str(tmp_path)}.get(model or "", model)
    assert find_request(make_args(target, spec_model=model)) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # What vLLM says last would send the user to a hub.
        ("nowhere", "the draft model .*nowhere does not exist; restore that folder"),
        ("empty", "Invalid repository ID or local directory .*empty"),
    ],
    ids=["nowhere", "empty"],
)
def test_a_folder_that_holds_no_drafter_is_refused_by_name(
    name: str, message: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        make_args(target, spec_model=str(tmp_path / name), spec_tokens=2).create_engine_config()


# Which targets give out their states


def test_a_class_that_inherits_the_interface_is_known_from_its_source() -> None:
    models = "vllm.model_executor.models"
    # In its own bases, through a class of another module, through a package.
    assert aux_states.declares_interface(f"{models}.llama", "LlamaForCausalLM")
    assert aux_states.declares_interface(f"{models}.mistral", "MistralForCausalLM")
    assert aux_states.declares_interface(f"{models}.transformers", "TransformersForCausalLM")
    assert not aux_states.declares_interface(f"{models}.gpt2", "GPT2LMHeadModel")
    assert not aux_states.declares_interface("no.such.module", "LlamaForCausalLM")


def test_a_class_whose_source_says_nothing_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aux_states, "declares_interface", lambda *names: False)
    aux_states.require_aux_hidden_states("LlamaForCausalLM")
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        aux_states.require_aux_hidden_states("GPT2LMHeadModel")


def test_an_architecture_that_vllm_does_not_know_is_left_to_vllm() -> None:
    aux_states.require_aux_hidden_states("NoSuchModel")


FORWARD = """
class Model:
    def forward(self, hidden_states, positions):
        residual = {first}
        aux_hidden_states = []
        for index, layer in enumerate(self.layers):
            if index in self.aux_hidden_state_layers:
                aux_hidden_states.append({state})
            hidden_states, residual = layer(positions, hidden_states, residual)
        if self.end_layer in self.aux_hidden_state_layers:
            aux_hidden_states.append(hidden_states + residual)
        return hidden_states, aux_hidden_states
"""


@pytest.mark.parametrize(
    ("first", "state", "fails"),
    [
        ("None", "hidden_states + residual", True),
        ("None", "residual + hidden_states", True),
        ("None", "hidden_states if residual is None else hidden_states + residual", False),
        ("None", "hidden_states", False),
        ("torch.zeros(1)", "hidden_states + residual", False),
    ],
)
def test_a_forward_that_adds_what_is_not_there_is_known_from_its_source(first: str, state: str, fails: bool) -> None:
    source = ast.parse(FORWARD.format(first=first, state=state))
    assert any(map(aux_states._adds_missing_residual, ast.walk(source))) is fails


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3NextForCausalLM", "GptOssForCausalLM", "NoSuchModel"]
)
def test_layer_0_of_other_targets_is_read(architecture: str) -> None:
    aux_states.require_first_state(architecture, [0, 4, 5])


def test_layer_0_of_a_model_that_transformers_runs_is_refused_at_start() -> None:
    # Else the start ends with `KeyError: -1` when weights are loaded.
    with pytest.raises(ValueError, match=r"SmolLM3ForCausalLM cannot hand out; .*--aux-layers 1,4,5"):
        aux_states.require_first_state("SmolLM3ForCausalLM", [0, 4, 5])
    aux_states.require_first_state("SmolLM3ForCausalLM", [1, 4, 5])


def test_other_layers_of_deepseek_are_read() -> None:
    aux_states.require_first_state("DeepseekV3ForCausalLM", [1, 4, 5])


# A plug-in that cannot be loaded


WITHOUT_US = """
import sys
sys.modules[sys.argv[1]] = None  # any import of it fails

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", sys.argv[2], "--dtype", "float32"]))
    print("ENGINE", args.create_engine_config().model_config.architecture)
    sys.argv = ["vllm", "serve", "--help"]
    from vllm.entrypoints.cli.main import main
    main()
"""


@pytest.mark.parametrize(
    ("module", "logged"),
    [
        (ENTRY_POINT.partition(":")[0], "Failed to load plugin qm_spec"),
        ("qm_spec.integrations.vllm_plugin.compat", "qm_spec: registering failed"),
        ("qm_spec.integrations.vllm_plugin.patches.resolution", "qm_spec: registering failed"),
    ],
    ids=["the entry point's module", "what it imports", "a patch's module"],
)
def test_vllm_works_without_a_plug_in_that_fails(module: str, logged: str, target: Path, tmp_path: Path) -> None:
    done = run_in_vllm(WITHOUT_US, tmp_path, module, str(target))
    assert done.returncode == 0, done.stdout
    assert "ENGINE LlamaForCausalLM" in done.stdout
    assert "usage: vllm serve" in done.stdout
    assert logged in done.stdout and f"import of {module} halted" in done.stdout
