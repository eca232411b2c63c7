"""A sharded policy, on the one rank of a process group; several ranks are the matter of `benchmarks/ranks.py` and
test_distributed.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from module_runs import SCENARIOS, fit, make_data, make_module, make_trainer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from vllm_stub import adapted, change, running

from stateset_lightning.algorithm import GRPO
from stateset_lightning.callbacks import ReferenceSync
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import (
    Group,
    LoRAConfig,
    Policy,
    PolicyConfig,
    load_model,
    make_reference,
    save_adapter,
)
from stateset_lightning.ranks import unsharded
from stateset_lightning.run.checkpoint_io import is_sharded, newest_checkpoints, read_checkpoint
from stateset_lightning.run.fsdp_strategy import SUPPORTED_STRATEGIES, FSDP2Strategy
from stateset_lightning.training.checks import check_strategy, total_norm
from stateset_lightning.training.fsdp import ServedShards, UnshardedCopy, filled, reference_of, sharded
from stateset_lightning.training.loss import zero_loss

GROUPS = [Group([3, 4, 5, 6], [[7, 8, 9], [9, 5]]), Group([8, 3], [[4], [5, 6, 7, 3]])]
ARCHITECTURES = ["llama", "qwen2", "gpt2"]  # separate head; tied head; another layout, and tied as well


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def make_pair(model: PreTrainedModel, mesh: DeviceMesh) -> tuple[Policy, Policy, UnshardedCopy]:
    """A policy as it is, the same sharded, and the latter's unsharded copy."""
    plain, sharded = Policy(copy.deepcopy(model), PolicyConfig("some")), Policy(model, PolicyConfig("some"))
    return plain, sharded, UnshardedCopy(sharded, mesh, torch.device("cpu"))


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    logprobs_T, entropies_T = policy.score(GROUPS, temperature=0.7)
    (logprobs_T.sum() + 0.1 * entropies_T.sum()).backward()  # type: ignore[no-untyped-call]
    return {name: unsharded(p.grad) for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sharded_policy_scores_and_learns_as_a_plain_one(
    name: str, make_model: Callable[..., Any], mesh: DeviceMesh
) -> None:
    plain, sharded, _ = make_pair(make_model(name), mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    blocks = [m for m in sharded.model.modules() if isinstance(m, FSDPModule)]
    assert len(blocks) == 2  # one for each layer; the rest belongs to the policy
    assert sharded.uses_packed_scoring == plain.uses_packed_scoring
    expected, mine = gradients(plain), gradients(sharded)
    assert expected.keys() == mine.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(mine[parameter], gradient, rtol=1e-5, atol=1e-6)
    norm = total_norm([p.grad for p in sharded.parameters() if p.grad is not None])
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(expected.values())), rel=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_unsharded_copy_has_the_weights_of_the_moment(
    name: str, make_model: Callable[..., Any], mesh: DeviceMesh
) -> None:
    _, sharded, copied = make_pair(make_model(name), mesh)
    with torch.no_grad():
        for p in sharded.parameters():
            p.add_(0.01)
        expected, _ = sharded.score(GROUPS)
    copied.fill()
    assert torch.equal(copied.policy.score_without_gradient(GROUPS)[0], expected)
    tied = copied.policy.model.get_output_embeddings().weight is copied.policy.model.get_input_embeddings().weight
    assert tied == (name != "llama")
    assert not any(p.requires_grad for p in copied.policy.parameters())


def test_an_emptied_copy_takes_no_memory(make_model: Callable[..., Any], mesh: DeviceMesh) -> None:
    _, sharded, copied = make_pair(make_model("llama"), mesh)

    def size() -> int:
        return sum(p.untyped_storage().nbytes() for p in copied.policy.parameters())

    assert size() == 0
    copied.fill()
    assert size() == 4 * sum(p.numel() for p in sharded.parameters())
    copied.empty()
    assert size() == 0


def test_a_rank_with_nothing_to_train_takes_part_in_every_gathering(
    make_model: Callable[..., Any], mesh: DeviceMesh
) -> None:
    _, sharded, _ = make_pair(make_model("llama"), mesh)
    forwards: list[str] = []
    for module in sharded.modules():
        if isinstance(module, FSDPModule) and module is not sharded:
            module.register_forward_hook(lambda *args: forwards.append("block"))
    zero_loss(sharded).backward()  # type: ignore[no-untyped-call]
    assert len(forwards) == 2
    assert all(p.grad is not None and not unsharded(p.grad).any() for p in sharded.parameters())


@pytest.mark.parametrize("served", [False, True])
def test_the_reference_of_a_sharded_policy_is_sharded(
    model_folder: Callable[..., Path], mesh: DeviceMesh, served: bool
) -> None:
    config = PolicyConfig(str(model_folder("llama")))
    expected, _ = Policy(load_model(config), config).score_without_gradient(GROUPS)
    policy = Policy(load_model(config), config)
    shards = ServedShards(policy, mesh) if served else UnshardedCopy(policy, mesh, torch.device("cpu"))
    reference = reference_of(shards.policy, torch.float32, shards)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    assert torch.equal(reference.score_without_gradient(GROUPS)[0], expected)
    parameters = list(reference.parameters())  # type: ignore[union-attr]
    assert all(isinstance(p, DTensor) and not p.requires_grad for p in parameters)


def test_a_model_that_does_not_say_what_its_blocks_are_is_refused(
    make_model: Callable[..., Any], mesh: DeviceMesh
) -> None:
    model = make_model("llama")
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="does not say what its blocks are"):
        make_pair(model, mesh)


def test_total_norm_of_nothing_is_zero() -> None:
    assert total_norm([]) == 0.0
    assert total_norm([torch.tensor([3.0]), torch.tensor([-4.0])]) == 5.0
    assert total_norm([torch.tensor([3.0]), torch.tensor([-4.0])], norm_type=float("inf")) == 4.0


def test_lightnings_own_sharded_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.strategy=ModelParallelStrategy is not supported: .* or fsdp2"):
        check_strategy(SimpleNamespace(strategy=ModelParallelStrategy()), SUPPORTED_STRATEGIES)  # type: ignore[arg-type]
    check_strategy(SimpleNamespace(strategy=FSDP2Strategy()), SUPPORTED_STRATEGIES)  # type: ignore[arg-type]


def test_one_thread_runs_the_collectives_of_a_group(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two crash the process within seconds when 200 `allgather_coalesced` are in flight, on torch's own group."""
    threads: list[int] = []

    def setup_distributed(strategy: ModelParallelStrategy) -> None:
        group = torch.distributed.new_group(backend="gloo")
        threads.append(group._get_backend(torch.device("cpu")).options._threads)  # type: ignore[attr-defined, union-attr]
        torch.distributed.destroy_process_group(group)

    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", setup_distributed)
    FSDP2Strategy()._setup_distributed()
    setup_distributed(FSDP2Strategy())  # outside, all is torch's own
    assert threads == [1, 2]


def run(folder: Path, **options: Any) -> Any:
    return fit(
        folder,
        options.pop("module", None),
        make_data(),
        devices=1,
        strategy=FSDP2Strategy(options.pop("shards", False)),
        **options,
    )


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "bfloat16": {"dtype": "bfloat16"},  # and the adapter float32, in the same shards
    "rank 1": {"rank": 1, "target_modules": ["q_proj"]},
    "dora": {"peft_kwargs": {"use_dora": True}},
    "more": {"peft_kwargs": {"modules_to_save": ["lm_head"], "bias": "all"}},
    "experts": {"model": "olmoe", "target_modules": "all-linear"},
}


@pytest.fixture
def make_adapted(model_folder: Callable[..., Path]) -> Callable[..., Policy]:
    def make(model: str = "llama", dtype: Any = "float32", **lora: Any) -> Policy:
        config = PolicyConfig(str(model_folder(model)), dtype=dtype, lora=LoRAConfig(**{"rank": 4, **lora}))
        policy = Policy(load_model(config), config)
        change(policy)
        return policy

    return make


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_a_sharded_adapter_learns_samples_and_is_saved_as_a_plain_one(
    options: dict[str, Any], make_adapted: Callable[..., Policy], mesh: DeviceMesh, tmp_path: Path
) -> None:
    plain, mine = make_adapted(**options), make_adapted(**options)
    copied = UnshardedCopy(mine, mesh, torch.device("cpu"))
    expected, found = gradients(plain), gradients(mine)
    assert expected.keys() == found.keys() == {f"model.{name}" for name in plain.adapter.names}  # type: ignore[union-attr]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    with filled(copied), copied.policy.merged_adapter(), plain.merged_adapter():
        assert torch.equal(*(p.score_without_gradient(GROUPS)[0] for p in (copied.policy, plain)))
    for policy, folder in ((plain, tmp_path / "plain"), (mine, tmp_path / "mine")):
        save_adapter(policy, folder)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "mine" / file.name).read_bytes() == file.read_bytes()


def test_the_start_of_a_sharded_adapter_is_scored_by_its_shards(
    make_adapted: Callable[..., Policy], mesh: DeviceMesh, tmp_path: Path
) -> None:
    save_adapter(plain := make_adapted(), tmp_path)
    config = replace(plain.config, adapter=str(tmp_path))
    change(policy := Policy(load_model(config), config))
    ServedShards(policy, mesh)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps casts of weights
        (before, _), reference = policy.score_without_gradient(GROUPS), make_reference(policy, torch.float32)
        start, _ = reference.score_without_gradient(GROUPS)
        assert torch.equal(start, plain.score_without_gradient(GROUPS)[0])
        assert not torch.equal(start, before)
        assert torch.equal(policy.score_without_gradient(GROUPS)[0], before)


class SavesOnce(Callback):
    """Inside an episode."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1 and not (file := Path(trainer.default_root_dir) / "some.ckpt").exists():
            trainer.save_checkpoint(file)


@pytest.mark.parametrize("shards", [False, True], ids=["file", "folder of shards"])
def test_a_run_of_a_sharded_adapter_is_the_plain_one_and_goes_on_from_its_checkpoint(
    tmp_path: Path, mesh: DeviceMesh, shards: bool
) -> None:
    """Also one that the other has saved. The reference is the adapter that the run started with."""

    def weights_of(folder: Path, sharded: bool, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        start = adapted()
        if ckpt_path is not None:
            change(start)
        save_adapter(start, tmp_path / "adapter")
        policy = PolicyConfig("tiny", adapter=str(tmp_path / "adapter"))
        trainer = fit(
            folder,
            make_module(policy, algorithm=GRPO(beta=0.05)),
            make_data(steps_per_episode=2),
            strategy=FSDP2Strategy(shards) if sharded else "auto",
            callbacks=[SavesOnce()],
            max_steps=3,
            gradient_clip_val=0.1,
            ckpt_path=ckpt_path,
        )
        assert trainer.lightning_module.metrics.last["policy/kl"] > 0
        return {name: unsharded(p).detach() for name, p in trainer.lightning_module.named_parameters()}

    def difference(weights: dict[str, torch.Tensor]) -> float:
        return max(float((weights[name] - value).abs().max()) for name, value in mine.items())

    mine = weights_of(tmp_path / "mine", sharded=True)
    file = tmp_path / "mine" / "some.ckpt"
    assert set(read_checkpoint(file)["state_dict"]) == {name for name in mine if "lora" in name}
    assert difference(weights_of(tmp_path / "resumed", sharded=True, ckpt_path=file)) == 0
    if not shards:  # which fsdp2 alone reads
        assert difference(weights_of(tmp_path / "plain", sharded=False)) < 1e-6
        assert difference(weights_of(tmp_path / "plain", sharded=False, ckpt_path=file)) < 1e-6
        plain_file = tmp_path / "plain" / "some.ckpt"
        assert difference(weights_of(tmp_path / "resumed", sharded=True, ckpt_path=plain_file)) < 1e-6


def test_quantized_weights_are_not_sharded(make_model: Callable[..., Any], mesh: DeviceMesh) -> None:
    policy = Policy(make_model("llama"), PolicyConfig("some"))
    policy.model.hf_quantizer = object()  # as transformers marks it
    with pytest.raises(ConfigError, match="fsdp2 does not shard quantized weights: use ddp"):
        sharded(policy, mesh, torch.device("cpu"), None)


def test_an_engine_that_does_not_know_shards_is_refused(make_model: Callable[..., Any], mesh: DeviceMesh) -> None:
    engine: Any = SimpleNamespace()
    with pytest.raises(ConfigError, match="does not sample by SimpleNamespace: use ddp or VLLMEngine"):
        sharded(Policy(make_model("llama"), PolicyConfig("some")), mesh, torch.device("cpu"), engine)


def test_a_reference_that_follows_sharded_weights_is_refused(tmp_path: Path, mesh: DeviceMesh) -> None:
    with pytest.raises(ConfigError, match="ReferenceSync cannot mix sharded weights"):
        run(tmp_path, module=make_module(algorithm=GRPO(beta=0.1)), callbacks=[ReferenceSync()])


def test_a_folder_of_shards_is_a_checkpoint_that_takes_its_name_when_it_is_whole(
    tmp_path: Path, mesh: DeviceMesh
) -> None:
    trainer = run(tmp_path, shards=True)
    file = tmp_path / "some.ckpt"
    for _ in range(2):  # the second takes the place of the first
        trainer.save_checkpoint(file)
    assert is_sharded(file)
    assert [path.name for path in tmp_path.iterdir()] == ["some.ckpt"]
    assert newest_checkpoints(tmp_path) == [file]
    content = read_checkpoint(file)
    weights = {name: unsharded(p) for name, p in trainer.lightning_module.named_parameters()}
    assert weights.keys() <= content["state_dict"].keys()
    assert all(torch.equal(content["state_dict"][name], value) for name, value in weights.items())
    assert content["stateset"]["step"] == 2


def test_an_optimizer_without_a_state_goes_on(tmp_path: Path, mesh: DeviceMesh) -> None:
    file = tmp_path / "some.ckpt"

    def trained(max_steps: int, **options: Any) -> Any:
        module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        return run(tmp_path, module=module, max_steps=max_steps, **options)

    trained(1).save_checkpoint(file)
    resumed, straight = trained(2, ckpt_path=file).lightning_module, trained(2).lightning_module
    pairs = zip(resumed.parameters(), straight.parameters(), strict=True)
    assert all(torch.equal(unsharded(a), unsharded(b)) for a, b in pairs)


def test_micro_steps_of_shards_are_not_chosen_from_memory(tmp_path: Path, mesh: DeviceMesh) -> None:
    with pytest.raises(ConfigError, match="auto knows no sharded weights: set it to a number with fsdp2"):
        fit(tmp_path, None, make_data(steps_per_episode="auto"), strategy=FSDP2Strategy())


def test_a_folder_of_shards_goes_on_with_fsdp2_alone(tmp_path: Path, mesh: DeviceMesh) -> None:
    file = tmp_path / "some.ckpt"
    run(tmp_path, shards=True).save_checkpoint(file)
    with pytest.raises(ConfigError, match=r"folder of shards: its run goes on with trainer\.strategy=fsdp2"):
        fit(tmp_path, ckpt_path=file, max_steps=3)


@pytest.mark.slow  # two runs and six evaluations
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_sharded_run_is_the_plain_one(tmp_path: Path, mesh: DeviceMesh, precision: str) -> None:
    """Validated before, while and after it trains, and used to predict."""
    results = []
    for strategy in (FSDP2Strategy(), "auto"):
        module, data = make_module(algorithm=GRPO(beta=0.05)), make_data(steps_per_episode=2, num_iterations=2)
        options = {
            "max_steps": 6,
            "limit_val_batches": 1.0,
            "val_check_interval": 3,
            "gradient_clip_val": 0.1,
            "precision": precision,
        }
        seed_everything(7, verbose=False)
        trainer = make_trainer(tmp_path, strategy=strategy, **options)
        before = trainer.validate(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data)
        after = trainer.validate(module, datamodule=data, verbose=False)
        assert module.policy is not None
        predicted = trainer.predict(module, make_data(predict=SCENARIOS), return_predictions=True)
        results.append(
            (
                before,
                after,
                predicted,
                {name: unsharded(p) for name, p in module.policy.named_parameters()},
                dict(module.metrics.last),
            )
        )
    (*sharded, mine, row), (*plain, theirs, expected) = results
    assert sharded == plain
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)
    for name in ("policy/grad_norm", "policy/loss", "policy/kl", "train/reward"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)


SERVED_SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from lightning.pytorch import Callback
from module_runs import SCENARIOS, fit, make_data, make_module
import safetensors.torch
from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import GRPO
from stateset_lightning.errors import DiskError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, policy
from stateset_lightning.rollout import VLLMEngine, handover
from stateset_lightning.run.fsdp_strategy import FSDP2Strategy
from stateset_lightning.ranks import unsharded

policy.TOKENS_WITHOUT_GRADIENT = {{"cpu": 1}}  # a forward for each group, of which ranks have different numbers
calls, samples, forwards = [], {{}}, []
score = Policy.score

def counted(self, groups, *options):
    if not torch.is_grad_enabled():
        calls.append([group.prompt for group in groups])
    return score(self, groups, *options)

class SomeReward(RewardFunction):
    def compute_reward(self, turns, context=None):  # one for all completions of most prompts: nothing to train
        asked = turns[0].content
        return 0.5 if "9" in asked or "3 + 4" in asked else sum(map(ord, turns[-1].content)) % 7

class Recorder(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.micro_step == 0:
            size = len(module.last_records) // len(batch)
            for p, position in enumerate(batch.positions):
                rows = module.last_records[p * size : (p + 1) * size]
                samples[batch.episode_index, position] = [(row["completion"], row["reward"]) for row in rows]

def run(devices, urls, folder, adapter):
    engine = VLLMEngine(urls, folder=folder)
    lora = LoRAConfig(rank=3, alpha=32) if adapter else None  # no rank has the same of it
    module = make_module(PolicyConfig("tiny", lora=lora), algorithm=GRPO(beta=0.05 if adapter else 0.0),
                         engine=engine, reward=SomeReward(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                         rollout=RolloutConfig(num_generations=2, max_new_tokens=5, temperature=4.0))
    data = make_data(batch_size=4 // devices, num_iterations=2, validation=SCENARIOS[:3], eval_batch_size=1)
    Policy.score = counted
    trainer = fit(Path(folder), module, data, callbacks=[Recorder()], devices=devices, max_steps=4,
                  strategy=FSDP2Strategy() if devices > 1 else "auto", limit_val_batches=1.0, val_check_interval=2,
                  check_val_every_n_epoch=None)
    result = {{"samples": samples, "metrics": dict(module.metrics.last), "calls": calls,
              "val": float(trainer.callback_metrics["val/reward"]),
              "weights": {{name: unsharded(p).detach() for name, p in module.policy.named_parameters()}}}}
    if devices > 1:
        assert module._sampled_policy is module.policy
        result["error"] = failed_write(engine, module, trainer.global_rank, last=1 if adapter else 2)
    torch.save(result, Path(folder) / f"world{{devices}}-rank{{trainer.global_rank}}.pt")

def failed_write(engine, module, rank, last):
    write, written = handover.save_file, []

    def full(*args, **options):
        written.append(rank)
        if len(written) == last:
            raise OSError(28, "No space left on device")
        write(*args, **options)

    handover.save_file = safetensors.torch.save_file = full
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(0.01)
    module._unsharded.fill()
    try:
        engine.sync(module.policy)
    except DiskError as error:
        return str(error), len(written)

if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[4:], sys.argv[3], sys.argv[2] == "adapter")
"""


@pytest.mark.slow  # starts three processes that import torch and lightning
@pytest.mark.parametrize("trained", ["all weights", pytest.param("adapter", marks=pytest.mark.long)])
def test_two_ranks_whose_shards_are_served_are_one_process(tmp_path: Path, trained: str) -> None:
    """Two servers share an episode's prompts. The second rank has fewer prompts to validate."""
    script = tmp_path / "run.py"
    script.write_text(SERVED_SCRIPT.format(tests=str(Path(__file__).parents[1])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for devices in (1, 2):
        with running() as first, running() as second:
            for server in (first, second):
                server.stub.reloads = True
            command = [sys.executable, str(script), str(devices), trained, str(tmp_path), first.url, second.url]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            asked = [len(server.stub.samples()) for server in (first, second)]
            assert min(asked) > 0
            assert sum(asked) == 2 * 4 * 2 + 2 * 3  # two episodes of 4 x 2, two validations
    one, *ranks = [torch.load(tmp_path / name, weights_only=True) for name in RESULTS]
    assert {**ranks[0]["samples"], **ranks[1]["samples"]} == one["samples"]
    assert len(one["samples"]) == 8
    assert one["metrics"]["policy/grad_norm"] > 0
    assert len(ranks[0]["calls"]) == len(ranks[1]["calls"])  # forwards without gradient
    if trained == "all weights":  # with a reference, every group is trained
        assert any([0] in call for call in ranks[0]["calls"] + ranks[1]["calls"])  # one of them had fewer groups
    for rank in ranks:
        assert all(torch.allclose(rank["weights"][name], value, atol=1e-6) for name, value in one["weights"].items())
        assert rank["val"] == one["val"]
        for name in ("train/reward", "policy/loss", "policy/grad_norm", "mismatch/kl"):
            assert rank["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-6), name
    (error, written), (other, unwritten) = [rank["error"] for rank in ranks]
    assert error == other
    assert (written, unwritten) == (1 if trained == "adapter" else 2, 0)  # the first rank's second block
    assert "no weights can be handed over there: [Errno 28] No space left on device" in error


RESULTS = ["world1-rank0.pt", "world2-rank0.pt", "world2-rank1.pt"]
