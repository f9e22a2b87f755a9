from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
from trtllm_stand_ins import QWEN3_32B, install, write_model

from engine_build.__main__ import main
from engine_build.commands import BuildOptions
from engine_build.memory_plan import (
    GIB,
    BranchLoad,
    activation_bytes,
    kv_bytes_per_token,
    plan_memory,
    weight_bytes,
)
from engine_build.model_shape import ModelError, read_model_shape

OPTIONS = BuildOptions(
    model_dir=Path("model"),
    output_dir=Path("engine"),
    dtype="bfloat16",
    kv_cache_dtype="auto",
    tp_size=1,
    max_batch_size=64,
    max_num_tokens=4096,
    max_seq_len=16384,
    tokens_per_block=32,
    calib_size=512,
    calib_dataset="cnn_dailymail",
    workers=1,
    examples_dir=Path("examples"),
)
LOAD = BranchLoad(num_branches=64, prefix_tokens=2048, branch_tokens=512)


def config_dir(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**QWEN3_32B, **changes}))
    return directory


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """Tests find the same on every machine: no GPU, no TensorRT-LLM but the stand-ins'."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))

    real = importlib.metadata.version

    def version(name: str) -> str:
        if not list((tmp_path / "trtllm/site").glob(f"{name}-*")):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def shape_32b(tmp_path):
    return read_model_shape(config_dir(tmp_path / "Qwen3-32B"))


@pytest.fixture
def tensorrt_llm(tmp_path, monkeypatch):
    return install(tmp_path / "trtllm", monkeypatch)


@pytest.fixture
def build(tmp_path, tensorrt_llm):
    """Runs a build of a tiny model with the stand-ins; returns the exit status."""
    write_model(tmp_path / "model")

    def run(*options: str) -> int:
        arguments = ["--model-dir", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]
        arguments += ["--examples-dir", str(tensorrt_llm.examples_dir)]
        arguments += ["--dtype", "bfloat16", "--tp-size", "2", "--max-seq-len", "1024"]
        return main(["build", *arguments, "--gpu-memory-gib", "24", *options])

    return run


# ---- the plan


def dry_run(capsys, *options: str) -> tuple[int, list[str], str]:
    status = main(["build", "--dry-run", *options])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_a_dry_run_prints_the_commands_of_a_bfloat16_build(tmp_path, capsys):
    model = config_dir(tmp_path / "Qwen3-32B")
    status, lines, _ = dry_run(
        capsys, *f"--model-dir {model} --output-dir e --dtype bfloat16 --tp-size 2".split()
    )
    assert status == 0
    assert lines[-2:] == [
        f"convert: {sys.executable} /app/examples/models/core/qwen/convert_checkpoint.py "
        f"--model_dir {model} --output_dir e/build/checkpoint --dtype bfloat16 --tp_size 2 "
        "--workers 2",
        "build: trtllm-build --checkpoint_dir e/build/checkpoint --output_dir e --workers 2 "
        "--gpt_attention_plugin auto --gemm_plugin auto --kv_cache_type paged "
        "--context_fmha enable --use_paged_context_fmha enable --use_fp8_context_fmha disable "
        "--remove_input_padding enable --tokens_per_block 32 --max_batch_size 64 "
        "--max_seq_len 16384 --max_input_len 16383 --max_num_tokens 4096 --max_beam_width 1 "
        "--output_timing_cache e/build/timing.cache",
    ]
    assert not (tmp_path / "e").exists()


def test_a_dry_run_prints_the_commands_of_an_fp8_build(tmp_path, capsys):
    model = config_dir(tmp_path / "Qwen3-32B")
    fp8 = f"--model-dir {model} --output-dir e --dtype fp8 --tp-size 1 --max-batch-size 128"
    status, lines, _ = dry_run(capsys, *fp8.split(), "--kv-cache-dtype", "fp8")
    assert status == 0
    assert lines[-2] == (
        f"quantize: {sys.executable} /app/examples/quantization/quantize.py --model_dir {model} "
        "--output_dir e/build/checkpoint --dtype bfloat16 --qformat fp8 --kv_cache_dtype fp8 "
        "--calib_size 512 --calib_dataset cnn_dailymail --tp_size 1"
    )
    assert "--use_fp8_context_fmha enable" in lines[-1]
    assert "--max_batch_size 128" in lines[-1]
    # Without an FP8 KV cache the builder would turn FP8 attention off again.
    _, lines, _ = dry_run(capsys, *fp8.split())
    assert "kv_cache_dtype" not in lines[-2]
    assert "--use_fp8_context_fmha disable" in lines[-1]


def test_a_dry_run_says_what_it_could_not_check(tmp_path, capsys):
    model = config_dir(tmp_path / "Qwen3-32B")
    status, lines, _ = dry_run(
        capsys, *f"--model-dir {model} --output-dir e --dtype fp8 --tp-size 1".split()
    )
    assert status == 0
    unchecked = [line for line in lines if line.startswith("not checked here:")]
    for what in ("tensorrt_llm", "trtllm-build", "--examples-dir", "GPU memory"):
        assert any(what in line for line in unchecked), what
    assert any(line.startswith("warning: --model-dir:") and "lacks" in line for line in lines)


def test_weights_and_kv_cache_of_32b_are_those_computed_by_hand(shape_32b):
    per_layer = 2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600
    norms = 64 * (2 * 5120 + 2 * 128) + 5120
    assert shape_32b.num_params == 64 * per_layer + norms + 2 * 151936 * 5120 == 32_762_123_264
    assert weight_bytes(shape_32b, "bfloat16", 1) == 65_524_246_528
    assert weight_bytes(shape_32b, "fp8", 1) == 64 * per_layer + 2 * (norms + 2 * 151936 * 5120)
    # The embedding is whole on both GPUs; everything else but the norms is halved.
    assert weight_bytes(shape_32b, "bfloat16", 2) == (
        64 * per_layer + 2 * (norms + 151936 * 5120) + 151936 * 5120
    )
    assert kv_bytes_per_token(shape_32b, "auto", 1) == 2 * 64 * 8 * 128 * 2 == 262144
    assert kv_bytes_per_token(shape_32b, "fp8", 2) == 65536
    assert kv_bytes_per_token(shape_32b, "auto", 16) == 2 * 64 * 1 * 128 * 2  # heads replicated


def test_replicated_heads_and_tied_embeddings_count_as_they_are_held(shape_32b):
    queries_and_mlp = 64 * (2 * 5120 * 8192 + 3 * 5120 * 25600)
    one_head = 64 * 2 * 5120 * 128  # a rank's keys and values
    wide = 151936 * 5120 + shape_32b.num_norm_params
    for tp in (8, 16):
        assert weight_bytes(shape_32b, "fp8", tp) == (
            queries_and_mlp // tp + one_head + 2 * (wide + 151936 // tp * 5120)
        )
    tied = dataclasses.replace(shape_32b, tie_word_embeddings=True)
    embedding = 2 * 151936 * 5120
    assert weight_bytes(shape_32b, "bfloat16", 1) - weight_bytes(tied, "bfloat16", 1) == embedding
    assert weight_bytes(shape_32b, "bfloat16", 2) == weight_bytes(tied, "bfloat16", 2)


def test_the_plan_counts_blocks_with_and_without_prefix_sharing(shape_32b):
    plan = plan_memory(shape_32b, OPTIONS, 80 * GIB, LOAD)
    assert plan.shared_blocks == 64 + 64 * 16  # 2048 / 32 once, 512 / 32 for each
    assert plan.unshared_blocks == 64 * 80
    free = 80 * GIB - weight_bytes(shape_32b, "bfloat16", 1) - 2 * GIB
    free -= activation_bytes(shape_32b, OPTIONS)
    assert plan.num_kv_blocks == int(0.9 * free) // (32 * 262144)
    assert plan.num_longest == plan.num_kv_blocks // 512
    # A prefix that ends inside a block: each branch has a copy of that block.
    ragged = plan_memory(shape_32b, OPTIONS, None, BranchLoad(4, 100, 10))
    assert (ragged.shared_blocks, ragged.unshared_blocks) == (3 + 4, 16)


def test_the_plan_says_what_fits_beside_a_full_decode_batch(shape_32b):
    plan = plan_memory(shape_32b, OPTIONS, None, LOAD)
    assert (plan.starts_per_iteration, plan.longest_prefill) == (126, 4032)
    assert 64 + 126 * 32 == 4096
    # A start takes one block, however long its branch is.
    longer = BranchLoad(num_branches=4, prefix_tokens=8192, branch_tokens=4096)
    assert plan_memory(shape_32b, OPTIONS, None, longer).starts_per_iteration == 126
    least = dataclasses.replace(OPTIONS, max_num_tokens=64 + 32)
    assert plan_memory(shape_32b, least, None, LOAD).starts_per_iteration == 1


@pytest.mark.parametrize(
    ("options", "max_num_tokens"),
    [
        ("", 4096),
        ("--max-batch-size 3585", 3585 + 16 * 32),
        ("--tokens-per-block 256", 64 + 16 * 256),
        ("--max-batch-size 2 --max-seq-len 1024", 2 * 1024),  # all that two sequences can have
        ("--max-batch-size 1 --max-seq-len 33", 33),
        ("--max-num-tokens 96", 96),
    ],
)
def test_the_tokens_of_an_iteration_follow_from_the_batch(
    tmp_path, capsys, options, max_num_tokens
):
    model = config_dir(tmp_path / "Qwen3-32B")
    status, lines, _ = dry_run(
        capsys,
        *f"--model-dir {model} --output-dir e --dtype bfloat16 --tp-size 1 {options}".split(),
    )
    assert status == 0
    assert f"--max_num_tokens {max_num_tokens} " in lines[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--max-num-tokens 95", "--max-num-tokens: must be in 96..1048576"),
        ("--max-num-tokens 95", "decoding alone could keep a start out"),
        ("--max-num-tokens 1048577", "--max-num-tokens: must be in 96..1048576"),
        ("--max-seq-len 32", "--max-seq-len: must be above --tokens-per-block"),
    ],
)
def test_an_iteration_without_room_for_a_start_is_refused(tmp_path, capsys, options, reason):
    model = config_dir(tmp_path / "Qwen3-32B")
    status, _, errors = dry_run(
        capsys,
        *f"--model-dir {model} --output-dir e --dtype bfloat16 --tp-size 1 {options}".split(),
    )
    assert status == 2
    assert reason in errors


def test_activations_grow_with_the_tokens_of_an_iteration(shape_32b):
    half = dataclasses.replace(OPTIONS, max_num_tokens=2048)
    logits = 8 * 64 * 151936
    whole_bytes, half_bytes = (activation_bytes(shape_32b, o) - logits for o in (OPTIONS, half))
    assert whole_bytes == 2 * half_bytes == 4096 * 2 * (2 * 5120 + 3 * 25600)


@pytest.mark.parametrize(
    ("gib", "what"), [(60, "weights, activations and runtime"), (66, "KV pool")]
)
def test_a_gpu_that_is_too_small_is_refused(tmp_path, capsys, gib, what):
    model = config_dir(tmp_path / "Qwen3-32B")
    status, _, errors = dry_run(
        capsys,
        *f"--model-dir {model} --output-dir e --dtype bfloat16 --tp-size 1".split(),
        *("--gpu-memory-gib", str(gib)),
    )
    assert status == 2
    assert "GPU memory" in errors
    assert what in errors
    assert "raise --tp-size" in errors


# ---- refusals


@pytest.mark.parametrize(("layers", "name"), [(64, "Qwen3-32B"), (63, "fine-tune")])
def test_published_sizes_are_recognised_by_shape(tmp_path, layers, name):
    shape = read_model_shape(config_dir(tmp_path / "fine-tune", num_hidden_layers=layers))
    assert (shape.name, shape.is_published) == (name, layers == 64)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        ({"model_type": "llama"}, "model_type"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({"head_dim": None}, "head_dim"),
        ({"hidden_size": "5120"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_other_models_are_refused_by_the_field(tmp_path, changes, field):
    with pytest.raises(ModelError, match=field):
        read_model_shape(config_dir(tmp_path / "model", **changes))


def test_all_problems_are_reported_together(tmp_path, capsys):
    model = config_dir(tmp_path / "Qwen3-32B")
    wrong = "--tp-size 3 --tokens-per-block 48 --kv-cache-dtype fp8 --max-num-tokens 8"
    status, _, errors = dry_run(
        capsys,
        *f"--model-dir {model} --output-dir {model} --dtype bfloat16 {wrong} --branches 0".split(),
        *("--max-seq-len", "50000"),
    )
    assert status == 2
    for what in (
        "--tp-size: 3 does not divide num_attention_heads",
        "num_key_value_heads",
        "--tokens-per-block: must be a power of two",
        "--kv-cache-dtype: fp8 needs --dtype fp8",
        "--max-num-tokens: must be in 112..",  # 64 decode, and one block of 48
        "--max-seq-len: 50000 is beyond the model's 40960",
        "--output-dir: is the model's directory",
        "--branches",
    ):
        assert what in errors, what


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"tensorrt_llm": "1.3.0rc22", "tensorrt": "10.14.1"}, "removed on main"),
        ({"tensorrt_llm": "1.1.0", "tensorrt": "10.14.1"}, "1.2.x is needed"),
        ({"tensorrt_llm": "1.20.0", "tensorrt": "10.14.1"}, "trtllm-serve"),
        ({"tensorrt_llm": "1.2.1", "tensorrt": "10.13.3.9"}, "tensorrt: 10.13.3.9"),
        ({}, "tensorrt_llm: not installed"),
    ],
)
def test_other_versions_are_refused_with_the_reason(
    tmp_path, monkeypatch, capsys, versions, reason
):
    trtllm = install(tmp_path / "trtllm", monkeypatch, versions)
    model = write_model(tmp_path / "model")
    arguments = ["--model-dir", str(model), "--output-dir", str(tmp_path / "out")]
    arguments += ["--dtype", "bfloat16", "--tp-size", "1", "--max-seq-len", "1024"]
    arguments += ["--examples-dir", str(trtllm.examples_dir), "--gpu-memory-gib", "24"]
    assert main(["build", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert trtllm.runs == []


def test_incomplete_and_damaged_weights_are_refused(build, tmp_path, capsys):
    (tmp_path / "model/model-00001-of-00002.safetensors").unlink()
    shard = tmp_path / "model/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    assert build() == 2
    errors = capsys.readouterr().err
    assert "lacks model-00001-of-00002.safetensors" in errors
    assert "model-00002-of-00002.safetensors: has" in errors


def test_a_shard_without_a_tensor_of_the_index_is_refused(build, tmp_path, capsys):
    index = tmp_path / "model/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["c"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert build() == 2
    assert "1 tensors of the index are not in it, e.g. c" in capsys.readouterr().err


def test_a_full_disk_is_refused(build, monkeypatch, capsys, tensorrt_llm):
    monkeypatch.setattr("engine_build.preflight.free_disk_bytes", lambda directory: 1000)
    assert build() == 2
    assert "--output-dir: converted checkpoint and engine take" in capsys.readouterr().err
    assert tensorrt_llm.runs == []


def test_a_directory_with_another_engine_is_left_alone(build, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    assert build("--force") == 2
    assert "was not built here" in capsys.readouterr().err


def test_gpus_are_held_against_the_options(build, tensorrt_llm, capsys, tmp_path):
    tensorrt_llm.add_gpus("NVIDIA A100-SXM4-80GB, 81920, 8.0, 590.44.01")
    assert build("--dtype", "fp8", "--dry-run") == 2
    captured = capsys.readouterr()
    assert "--dtype: fp8 needs compute capability 8.9" in captured.err
    assert "warning: --tp-size: 2 GPUs are needed to serve, 1 visible here" in captured.out


# ---- the build


def test_a_build_leaves_engine_manifest_and_logs(build, tensorrt_llm, tmp_path, capsys):
    tensorrt_llm.add_gpus(*["NVIDIA H200, 143771, 9.0, 590.44.01"] * 2)
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build"]
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    for name, argv in manifest["commands"].items():
        assert f"{name}: {' '.join(argv)}" in out  # printed before it is run
        assert f"stand-in {name} runs" in (tmp_path / f"out/build/{name}.log").read_text()
    assert manifest["schema_version"] == 1
    assert manifest["versions"]["tensorrt"] == "10.14.1.48"
    assert manifest["versions"]["cuda_driver"] == "590.44.01"
    assert set(manifest["engine_sha256"]) == {"rank0.engine", "rank1.engine"}
    assert set(manifest["inputs_sha256"]) == {p.name for p in (tmp_path / "model").iterdir()}
    assert manifest["memory_plan"]["tokens_per_block"] == 32
    fingerprint = manifest["fingerprint"]
    assert fingerprint.pop("engine_sha256")
    assert fingerprint == {
        "engine": "trtllm",
        "model": "model",
        "dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16",
        "tp_size": "2",
        "gpu": "NVIDIA H200",
        "tensorrt_llm": "1.2.1",
        "tokens_per_block": "32",
        "max_batch_size": "64",
        "max_num_tokens": "4096",
    }


def test_an_fp8_build_goes_through_quantisation(build, tensorrt_llm, tmp_path):
    assert build("--dtype", "fp8", "--kv-cache-dtype", "fp8", "--tp-size", "1") == 0
    assert tensorrt_llm.runs == ["quantize", "build"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["build_config"]["plugin_config"]["use_fp8_context_fmha"] is True


def test_a_failed_step_is_resumed(build, tensorrt_llm, capsys, tmp_path):
    tensorrt_llm.fail("build")
    assert build() == 1
    errors = capsys.readouterr().err
    assert "step `build` failed with exit status 3" in errors
    assert f"log: {tmp_path / 'out/build/build.log'}" in errors
    assert "no memory left on the device" in errors
    assert "run the same command again" in errors
    assert not (tmp_path / "out/manifest.json").exists()

    tensorrt_llm.fail("build", fails=False)
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build", "build"]
    assert "convert: done already by the same command, skipped" in capsys.readouterr().out


def test_a_failed_first_step_runs_again(build, tensorrt_llm):
    """Its files are complete, but it ended badly."""
    tensorrt_llm.fail("convert")
    assert build() == 1
    assert tensorrt_llm.runs == ["convert"]
    tensorrt_llm.fail("convert", fails=False)
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "convert", "build"]


def test_a_checkpoint_that_a_failed_attempt_touched_is_made_again(build, tensorrt_llm, tmp_path):
    assert build() == 0
    tensorrt_llm.fail("convert")
    assert build("--workers", "1") == 1  # another command, in the same directory
    tensorrt_llm.fail("convert", fails=False)
    (tmp_path / "out/rank1.engine").unlink()
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build", "convert", "convert", "build"]


def test_only_what_changed_is_done_again(build, tensorrt_llm, tmp_path, capsys):
    assert build() == 0
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build"]
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "out/build/checkpoint/rank0.safetensors").unlink()
    assert build() == 0  # a finished engine does not need its checkpoint
    assert tensorrt_llm.runs == ["convert", "build"]
    assert build("--max-batch-size", "32") == 0  # another engine does
    assert tensorrt_llm.runs == ["convert", "build"] * 2
    assert build("--max-batch-size", "16") == 0
    assert tensorrt_llm.runs == ["convert", "build", "convert", "build", "build"]
    assert build("--max-batch-size", "16", "--force") == 0
    assert tensorrt_llm.runs[5:] == ["convert", "build"]


def test_changed_weights_and_versions_are_built_again(build, tensorrt_llm, tmp_path, monkeypatch):
    assert build() == 0
    before = json.loads((tmp_path / "out/manifest.json").read_text())
    shard = tmp_path / "model/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert build() == 0
    after = json.loads((tmp_path / "out/manifest.json").read_text())
    changed = {
        name
        for name, digest in after["inputs_sha256"].items()
        if before["inputs_sha256"][name] != digest
    }
    assert changed == {shard.name}
    monkeypatch.setattr(
        "engine_build.build.software_versions", lambda gpus: {"tensorrt_llm": "1.2.2"}
    )
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build"] * 3


@pytest.mark.parametrize(
    ("plugin", "fault"),
    [
        ({"use_paged_context_fmha": False}, "use_paged_context_fmha: asked for True, is False"),
        ({"tokens_per_block": 64}, "tokens_per_block: asked for 32, is 64"),
        ({"gemm_plugin": None}, "gemm_plugin: is off"),
    ],
)
def test_a_flag_that_was_not_honoured_is_found(build, monkeypatch, capsys, plugin, fault):
    monkeypatch.setenv("STAND_IN_PLUGIN", json.dumps(plugin))
    assert build() == 1
    errors = capsys.readouterr().err
    assert "step `build` ended, but its result is not what was asked for" in errors
    assert fault in errors


def test_a_missing_rank_is_found(build, monkeypatch, capsys, tmp_path):
    assert build("--max-batch-size", "32") == 0  # leaves a rank1.engine that must not count
    monkeypatch.setenv("STAND_IN_MISSING", "1")
    assert build() == 1
    assert f"{tmp_path / 'out/rank1.engine'}: missing or empty" in capsys.readouterr().err
    monkeypatch.delenv("STAND_IN_MISSING")
    assert build() == 0


def test_an_engine_that_was_cut_short_is_built_again(build, tensorrt_llm, tmp_path):
    assert build() == 0
    (tmp_path / "out/rank1.engine").write_bytes(b"")
    assert build() == 0
    assert tensorrt_llm.runs == ["convert", "build", "build"]


@pytest.mark.parametrize("gib", ["nan", "inf", "-1"])
def test_a_gpu_without_a_size_is_refused(build, capsys, gib):
    assert build("--gpu-memory-gib", gib) == 2
    assert "--gpu-memory-gib: must be positive" in capsys.readouterr().err


def test_a_moe_is_refused_in_one_message(tmp_path, capsys):
    model = config_dir(tmp_path / "moe", model_type="qwen3_moe", num_experts=128)
    status, _, errors = dry_run(
        capsys, *f"--model-dir {model} --output-dir e --dtype fp8 --tp-size 1".split()
    )
    assert status == 2
    assert "only dense Qwen3 are built" in errors
    assert "Traceback" not in errors


def test_a_tiny_model_stands_for_no_published_size(build, capsys):
    assert build("--dry-run") == 0
    assert "a dense Qwen3 of no published size" in capsys.readouterr().out
