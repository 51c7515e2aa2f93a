"""DeepSpeed's stages 1, 2 and 3 on two real processes, against one process on the same global batches."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_script
from lightning.pytorch.strategies import DeepSpeedStrategy
from modules import Llama, Regression, assert_same, by_hand, inputs, trainer
from torch import Tensor

from lightning_peft import AdaLoRA, DoRA, LoRA, PEFTError, PEFTStrategy, load_adapter
from lightning_peft.callbacks.summary import summary_table
from lightning_peft.formats.deepspeed import is_deepspeed, require_layout

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

NAMES = {f"net.{layer}.peft.default.lora_{which}" for layer in (0, 2) for which in "AB"}
ELEMENTS = 2 * (8 + 16) + 2 * (16 + 4)
HALVES = ("half1", "half2", "half3")

stages = pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])


class Run:
    """What both ranks of ``deepspeed_script.py`` saw, and what one process does without DeepSpeed."""

    def __init__(self, what: str, out: Path) -> None:
        import deepspeed_script as script

        self.out, self.script = out, script
        self.single = {
            "three": script.fit(out, "single", "auto"),
            "limits": script.fit(out, "single-limits", "auto", **script.LIMITS),
            "three steps": script.fit(out, "single-steps", "auto", max_steps=3),
            "again": script.fit_twice(out, "single-again", "auto"),
            "config": script.fit(out, "single-config", "auto", module=script.Constant),
            "whole": script.fit(out, "single-whole", "auto", **script.WHOLE),
            "odd": script.fit(out, "single-odd", "auto", module=script.Odd, **script.WHOLE),
        }
        script.fit(out, "single-two", "auto", 2)
        script.fit(out, "single-odd-two", "auto", 2, module=script.Odd, **script.WHOLE)
        Llama().model.save_pretrained(out / "base", max_shard_size="10KB")
        run_script(script.__file__, what, out, timeout=500)
        self.ranks = [torch.load(file, weights_only=True) for file in sorted(out.glob("rank*.pt"))]

    def __getitem__(self, name: str) -> Any:
        return self.ranks[0][name]

    def learnt(self, name: str) -> dict[str, Tensor]:
        """Return what one process learnt, saved before the merge."""
        state: dict[str, Tensor] = self.single[name][0].strategy.lightning_module_state_dict()
        return state


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run("first", tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run("more", tmp_path_factory.mktemp("more"))


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Up to the order of additions: two processes average two means, and ZeRO-3 has a matrix product of its own."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)


def base_weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in Regression().named_parameters()}


def fitted(run: Run) -> list[str]:
    return [name for name, content in run.ranks[0].items() if isinstance(content, dict) and "elements" in content]


def assert_ranks_equal(run: Run) -> None:
    names = fitted(run)
    assert len(run.ranks) == 2
    for name in names:
        one, other = run.ranks[0][name], run.ranks[1][name]
        assert_same(one["adapters"], other["adapters"])
        assert_same(one["weights"], other["weights"])
        assert torch.equal(one["outputs"], other["outputs"]), name
        assert one["merged"], name
        assert other["merged"], name


class TestEveryStage:
    def test_ranks_are_equal(self, first: Run) -> None:
        assert_ranks_equal(first)

    @stages
    def test_two_processes_learn_what_one_does(self, first: Run, stage: str) -> None:
        expected = first.learnt("three")
        assert expected.keys() == NAMES
        assert_near(first[stage]["adapters"], expected)
        assert_near(first[f"{stage}-limits"]["adapters"], first.learnt("limits"))
        assert_near(first[f"{stage}-again"]["adapters"], first.learnt("again"))
        assert_near(first[f"{stage}-evaluated"]["adapters"], expected)
        assert first[f"{stage}-limits"]["steps"] == first.single["limits"][0].global_step == 3

    @stages
    def test_a_gradient_that_is_not_finite_stops_before_the_step(self, first: Run, stage: str) -> None:
        for rank in first.ranks:
            learnt, merged, _ = rank[f"{stage}-diverging"]
            assert_near(learnt, first.learnt("three steps"))
            assert not merged
        *_, said = first[f"{stage}-diverging"]
        (told,) = (text for text in said if text.startswith("At step 3 the gradient of 'net."))
        assert "holds NaN or infinity. The run stops" in told
        assert told.endswith(("There is no checkpoint yet.", "last."))

    @stages
    @pytest.mark.parametrize("kind", ["odd", "odd-resumed"])
    def test_sizes_that_processes_do_not_divide(self, first: Run, stage: str, kind: str) -> None:
        expected = {name.removeprefix("net.2."): value for name, value in first.learnt("odd").items()}
        for rank in first.ranks:
            assert_near(rank[f"{stage}-{kind}"], expected)

    @stages
    def test_optimizer_state_is_for_adapters_only(self, first: Run, stage: str) -> None:
        # Two moments, shared by two processes.
        assert [rank[stage]["elements"] for rank in first.ranks] == [ELEMENTS, ELEMENTS]

    @stages
    def test_the_summary_counts_what_is_in_pieces(self, first: Run, stage: str) -> None:
        fitted, module = first.single["three"]
        assert first[f"{stage}-summary"] == summary_table(module, fitted.optimizers, "")

    @stages
    def test_the_merged_model_computes_what_its_adapters_say(self, first: Run, stage: str) -> None:
        for name in (stage, f"{stage}-again"):
            content = first[name]
            torch.testing.assert_close(content["outputs"], by_hand(content["adapters"], inputs()), rtol=0, atol=1e-6)
            assert not torch.equal(content["weights"]["net.0.weight"], base_weights()["net.0.weight"])

    @stages
    @pytest.mark.parametrize("what", ["unmerged", "ejected"])
    def test_the_base_comes_back_bit_for_bit(self, first: Run, stage: str, what: str) -> None:
        assert_same(first[f"{stage}-{what}"], base_weights())

    @stages
    def test_adapters_run_in_evaluation(self, first: Run, stage: str) -> None:
        """Lightning deletes all hooks then. Two adapters, in two batches."""
        tests = first[f"{stage}-tests"]
        merged, directory, file = (tests[kind] for kind in ("merged", "directory", "file"))
        assert (merged[0], directory[0], file[0]) == (0, 4, 4)
        for _, losses in (directory, file):
            assert losses[0]["test_loss"] == pytest.approx(merged[1][0]["test_loss"], abs=1e-6)
        assert {kind: count for kind, (count, _) in first[f"{stage}-unfitted"].items()} == {"validate": 4, "predict": 4}
        assert_same(first[f"{stage}-tested"], first[stage]["adapters"])

    @stages
    @pytest.mark.parametrize("kind", ["directory", "file"])
    def test_resuming_goes_on_exactly(self, first: Run, stage: str, kind: str) -> None:
        assert_same(first[f"{stage}-{kind}"]["adapters"], first[stage]["adapters"])
        assert first[f"{stage}-{kind}"]["steps"] == first[stage]["steps"]

    @stages
    def test_a_checkpoint_of_one_process_resumes(self, first: Run, stage: str) -> None:
        assert_near(first[f"{stage}-single"]["adapters"], first.learnt("three"))

    @stages
    def test_a_directory_resumes_on_one_process(self, first: Run, stage: str) -> None:
        path = first.out / f"{stage}-two-directories" / "last"
        resumed, _ = first.script.fit(first.out, f"{stage}-to-single", "auto", resume=path)
        assert_near(resumed.strategy.lightning_module_state_dict(), first.learnt("three"))

    @stages
    def test_a_directory_is_whole_and_exact(self, first: Run, stage: str) -> None:
        module, path = Regression(), first.out / f"{stage}-directories" / "last"
        load_adapter(module, path)
        torch.testing.assert_close(module(inputs()), first[stage]["outputs"], rtol=0, atol=1e-6)
        saved = trainer(first.out).strategy.load_checkpoint(path, weights_only=True)
        assert_same(saved["state_dict"], first[stage]["adapters"])
        states = saved["optimizer_states"][0]["state"]
        assert states.keys() == NAMES
        for name, entry in states.items():
            assert entry["exp_avg"].shape == saved["state_dict"][name].shape
            assert entry["step"] == first[stage]["steps"]

    @stages
    def test_a_file_of_deepspeed_holds_adapter_state_only(self, first: Run, stage: str) -> None:
        path = first.out / f"{stage}-files" / "last.ckpt"
        for file in (path / "checkpoint").glob("*_model_states.pt"):
            content = torch.load(file, weights_only=True)
            assert content["module"].keys() == NAMES
            assert content["frozen_param_fragments"] is None
            assert "lightning_peft" in content

    @stages
    def test_saved_without_an_optimizer_it_is_a_single_file(self, first: Run, stage: str) -> None:
        saved = torch.load(first.out / f"{stage}-after-test.ckpt", weights_only=True)
        assert_same(saved["state_dict"], first[stage]["adapters"])

    def test_other_base_strategies_refuse_it(self, first: Run) -> None:
        path = first.out / "stage2-files" / "last.ckpt"
        with pytest.raises(PEFTError, match=r"written by DeepSpeed.*AdapterCheckpoint"):
            first.script.fit(first.out, "no", "auto", resume=path)

    def test_another_number_of_processes_is_refused(self, first: Run) -> None:
        path = first.out / "stage2-files" / "last.ckpt"
        assert is_deepspeed(path)
        require_layout(path, 2, 2)
        with pytest.raises(PEFTError, match=r"processes=2; this run has processes=4.*AdapterCheckpoint"):
            require_layout(path, 2, 4)


@pytest.mark.slow
class TestMore:
    def test_ranks_are_equal(self, more: Run) -> None:
        assert_ranks_equal(more)

    @pytest.mark.parametrize("tag", HALVES)
    @pytest.mark.parametrize("kind", ["directory", "file"])
    def test_bfloat16_resumes_exactly(self, more: Run, tag: str, kind: str) -> None:
        """What DeepSpeed steps are float32 copies; they are saved, and outlive the run that made them."""
        expected = more[tag]["adapters"]
        assert_same(more[f"{tag}-{kind}"]["adapters"], expected)
        for name, value in expected.items():
            assert value.dtype == torch.float32
            assert not torch.equal(value, value.bfloat16().float()), name

    @pytest.mark.parametrize("tag", HALVES)
    def test_evaluation_in_bfloat16_does_not_round_adapters(self, more: Run, tag: str) -> None:
        assert_same(more[f"{tag}-tested"], more[tag]["adapters"])
        assert more[tag]["weights"]["net.0.weight"].dtype == torch.bfloat16

    def test_built_in_pieces_and_filled_from_files(self, more: Run) -> None:
        expected = more.script.fit_from_files(more.out, "auto")
        assert_near(more["files"]["adapters"], expected["adapters"])
        assert more["files"]["merged"]
        assert more["files"]["loss"] == pytest.approx(expected["loss"], abs=1e-5)

    def test_a_method_that_reads_the_weights(self, more: Run) -> None:
        _, module = more.script.fit(more.out, "single-dora", "auto", method=DoRA(r=2))
        expected = {name: p for name, p in module.named_parameters() if ".peft." in name}
        assert_near(more["dora"]["adapters"], expected)

    def test_built_in_pieces_in_bfloat16(self, more: Run) -> None:
        assert_same(more["half-late"]["adapters"], more["half3"]["adapters"])

    @pytest.mark.parametrize("tag", ["late", "injects", "full", "full-resumed", "config", "offload2", "offload3"])
    def test_learns_what_one_process_does(self, more: Run, tag: str) -> None:
        assert_near(more[tag]["adapters"], more.learnt("config" if tag == "config" else "three"))
        assert more[tag]["elements"] == ELEMENTS

    @pytest.mark.parametrize("tag", ["offload2", "offload3"])
    @pytest.mark.parametrize("kind", ["directory", "file"])
    def test_offloaded_state_resumes(self, more: Run, tag: str, kind: str) -> None:
        assert_same(more[f"{tag}-{kind}"]["adapters"], more[tag]["adapters"])

    @pytest.mark.parametrize("tag", ["whole", "whole-late"])
    def test_a_module_trained_whole(self, more: Run, tag: str) -> None:
        expected, weights = more.learnt("whole"), more[tag]["weights"]
        trained = {name: weights[name] for name in ("net.2.weight", "net.2.bias")}
        assert_near({**more[tag]["adapters"], **trained}, expected)
        assert_same(more[f"{tag}-ejected"], base_weights())

    def test_what_is_trained_whole_is_saved_in_float32(self, more: Run) -> None:
        """Its copy in the module is bfloat16, that of the optimizer is not."""
        read = trainer(more.out).strategy.load_checkpoint
        judge, resumed = (
            read(more.out / f"{tag}-directories" / "last") for tag in ("whole-half", "whole-half-resumed")
        )
        assert_same(resumed["state_dict"], judge["state_dict"])
        head = judge["state_dict"]["net.2.weight"]
        assert not torch.equal(head, head.bfloat16().float())

    def test_small_weights_that_stay_gathered_are_unmerged(self, more: Run) -> None:
        assert more["persistent-gathered"] == (16, 8)
        assert_same(more["persistent-unmerged"], base_weights())

    def test_hooks_of_the_last_run_are_gone(self, more: Run) -> None:
        before, after = more["hooks"]
        assert after == before

    def test_a_second_trainer_takes_the_module_over(self, more: Run) -> None:
        _, module = more.script.fit(more.out, "single-first", "auto")
        again, _ = more.script.fit(more.out, "single-second", "auto", module=lambda: module)
        assert_near(more["handover"]["adapters"], again.strategy.lightning_module_state_dict())

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("stage", "stage=2; this run has stage=3"),
            ("groups", "in another order"),
            ("pickles", "whose files DeepSpeed itself unpickles"),
            ("rank", "was written with r=2"),
            ("tied", "'net.0' is adapted and shares its weight"),
            ("full", "Use checkpoint='adapter', or stage 2"),
            ("no stage", "Choose stage 1, 2 or 3"),
            ("emptied group", "Param group 0 from configure_optimizers holds frozen parameters only"),
            ("several", "several adapters, a, b. DeepSpeed"),
        ],
    )
    def test_errors(self, more: Run, kind: str, expected: str) -> None:
        for rank in more.ranks:
            assert expected in rank["errors"][kind]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnGPU:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Run:
        return Run("gpu", tmp_path_factory.mktemp("gpu"))

    @pytest.mark.parametrize("tag", ["gpu1", "gpu2", "gpu3", "gpu2-offload", "gpu3-offload"])
    def test_trains_resumes_and_merges(self, run: Run, tag: str) -> None:
        expected = run[f"{tag}-whole"]
        for kind in ("whole", "directory", "file"):
            content = run[f"{tag}-{kind}"]
            assert_same(content["adapters"], expected["adapters"])
            assert content["loss"] == pytest.approx(expected["loss"])
            assert content["merged"]
            assert content["calls"] == 0
            assert all(value.dtype == torch.float32 for value in content["adapters"].values())


@pytest.mark.parametrize("stage", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3_offload"])
def test_names(stage: str) -> None:
    strategy = PEFTStrategy(LoRA(r=2), base=stage)
    assert isinstance(strategy, DeepSpeedStrategy)
    named = trainer(Path(), f"peft_lora_{stage}", accelerator="cpu").strategy
    assert type(named) is type(strategy)


def test_methods_that_read_gradients_are_refused() -> None:
    strategy = PEFTStrategy(AdaLoRA(), base="deepspeed_stage_2")
    with pytest.raises(PEFTError, match=r"AdaLoRA reads and changes gradients .* Use another base"):
        strategy.setup(None)  # type: ignore[arg-type]


def test_steps_that_cannot_be_left_out() -> None:
    strategy = PEFTStrategy(LoRA(r=2), base="deepspeed_stage_2", on_nonfinite="skip")
    with pytest.raises(PEFTError, match=r"on_nonfinite='skip' .* on DeepSpeed.*Use on_nonfinite='stop'"):
        strategy.setup(None)  # type: ignore[arg-type]


class TestCalls:
    """What is called, or overridden, in the way in which it is: DeepSpeed and Lightning may change it."""

    def accepts(self, function: Any, *arguments: Any, **named: Any) -> None:
        inspect.signature(function).bind(*arguments, **named)

    def test_state_by_parameter(self) -> None:
        from deepspeed import utils

        self.accepts(utils.safe_get_full_fp32_param, None)
        self.accepts(utils.safe_get_full_grad, None)
        self.accepts(utils.safe_set_full_fp32_param, None, None)
        self.accepts(utils.safe_get_full_optimizer_state, None, "exp_avg")
        self.accepts(utils.safe_set_full_optimizer_state, None, None, "exp_avg")
        self.accepts(utils.lazy_init_hp_params_optimizer_state, [], None, {})

    def test_gathering(self) -> None:
        import deepspeed
        from deepspeed.runtime.zero import partition_parameters

        self.accepts(deepspeed.zero.GatheredParameters, [], modifier_rank=0)
        source = inspect.getsource(partition_parameters)
        for attribute in ("param.ds_tensor", "param.ds_shape", "param.partition ="):
            assert attribute in source

    def test_engine(self) -> None:
        from deepspeed import DeepSpeedEngine
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        self.accepts(
            DeepSpeedEngine.load_checkpoint,
            None,
            "path",
            tag="checkpoint",
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
        self.accepts(DeepSpeedEngine.save_checkpoint, None, "path", client_state={}, exclude_frozen_parameters=True)
        self.accepts(DeepSpeedEngine.destroy, None)
        for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
            self.accepts(optimizer.has_overflow, None)
        self.accepts(DeepSpeedEngine.zero_optimization_stage, None)
        self.accepts(get_fp32_state_dict_from_zero_checkpoint, "path", tag="checkpoint", exclude_frozen_parameters=True)
        assert "self.fp32_partitioned_groups_flat" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)

    def test_lightning(self) -> None:
        self.accepts(DeepSpeedStrategy._init_optimizers, None)
        self.accepts(DeepSpeedStrategy._setup_model_and_optimizer, None, None, None, None)
        self.accepts(DeepSpeedStrategy._initialize_deepspeed_inference, None, None)
        source = inspect.getsource(DeepSpeedStrategy._initialize_deepspeed_train)
        assert "self._init_optimizers()" in source
        assert "self._setup_model_and_optimizer(" in source
