"""A directory that stands for a compiled engine: what `trtllm-build` would leave, without weights.

`config.json` has TensorRT-LLM's layout. `rank0.engine` is a small JSON file that names what
computes: `{"drive": "virtual" | "threaded", "num_kv_blocks": N, "decoder": {"kind": "torch", ...} |
{"kind": "profile", ...}}`. Engines of several ranks have one such file each (`ranks.py`).

    python -m perf.trtllm_fake.engine_dir --output-dir ENGINE --hidden-size 64 --vocab-size 512
    python -m perf.trtllm_fake.engine_dir --output-dir ENGINE --profile PROFILE --drive virtual
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perf.trtllm_fake.decoders import Decoder, FailingDecoder, ProfileDecoder, TorchDecoder
from taper_trtllm.config import ConfigError, RandomModelConfig, TorchEngineConfig
from taper_trtllm.engines.simulated import Disturbance
from taper_trtllm.profile import ProfileError, load_profile

VERSION = "1.2.1"
_PositiveInt = Annotated[int, Field(ge=1)]
_Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EngineDirError(RuntimeError):
    """A directory that cannot be served, with the file and what is wrong with it."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PluginConfig(_Lenient):
    """`build_config.plugin_config` of `config.json`: what the runtime looks at."""

    paged_kv_cache: bool = True
    use_paged_context_fmha: bool = True
    remove_input_padding: bool = True
    tokens_per_block: _PositiveInt = 32


class BuildConfig(_Lenient):
    """`build_config` of `config.json`: what the runtime looks at."""

    max_input_len: _PositiveInt = 1024
    max_seq_len: _PositiveInt
    max_batch_size: _PositiveInt
    max_beam_width: Literal[1] = 1
    max_num_tokens: _PositiveInt
    plugin_config: PluginConfig = PluginConfig()


class EngineDescription(_Lenient):
    """`config.json`."""

    version: str
    pretrained_config: dict[str, Any]
    build_config: BuildConfig

    @property
    def num_ranks(self) -> int:
        """Processes that it runs in."""
        return int(self.pretrained_config.get("mapping", {}).get("world_size", 1))


class TorchDecoderConfig(_Model):
    """A Qwen3 on the CPU.

    Attributes:
        model_dir: Local Hugging Face directory; None for `random_model`.
        random_model: Shape and seed.
        step_ms: What a step is said to take; None for what it takes.
        num_threads: CPU threads of a step.
    """

    kind: Literal["torch"] = "torch"
    model_dir: Path | None = None
    random_model: RandomModelConfig = RandomModelConfig()
    step_ms: _Milliseconds | None = None
    num_threads: _PositiveInt = 1


class ProfileDecoderConfig(_Model):
    """A latency profile.

    Attributes:
        path: Of the profile, relative to the engine directory.
        disturbance: How the device differs from it.
        seed: Of its noise.
        token: See `ProfileDecoder`.
    """

    kind: Literal["profile"] = "profile"
    path: Path
    disturbance: Disturbance = Disturbance()
    seed: int = 0
    token: Annotated[int, Field(ge=0)] | None = None


class FakeEngine(_Model):
    """`rank0.engine`.

    Attributes:
        drive: See `RuntimeConfig`.
        num_kv_blocks: KV blocks if `KvCacheConfig.max_tokens` does not say; what is left of the
            memory of the device in the original.
        decoder: What computes.
        fail_at_iteration: This step fails, and with it all that is active; those after it do not.
    """

    drive: Literal["threaded", "virtual"] = "threaded"
    num_kv_blocks: _PositiveInt = 4096
    decoder: Annotated[TorchDecoderConfig | ProfileDecoderConfig, Field(discriminator="kind")] = (
        TorchDecoderConfig()
    )
    fail_at_iteration: Annotated[int, Field(ge=0)] | None = None


def read_engine_dir(path: Path) -> tuple[EngineDescription, FakeEngine]:
    """Reads `config.json` and `rank0.engine`.

    Raises:
        EngineDirError: A file is missing, malformed, or of another version.
    """
    description = _read(path / "config.json", EngineDescription)
    if description.version != VERSION:
        raise EngineDirError(
            f"{path / 'config.json'}: version {description.version!r}, this is {VERSION}: build "
            "the engine again"
        )
    return description, _read(path / "rank0.engine", FakeEngine)


def create_decoder(path: Path, description: EngineDescription, engine: FakeEngine) -> Decoder:
    """What computes the steps.

    Raises:
        EngineDirError: The model or the profile cannot be used.
    """
    decoder = _create_decoder(path, description.build_config, engine.decoder)
    if engine.fail_at_iteration is None:
        return decoder
    return FailingDecoder(decoder, engine.fail_at_iteration)


def _create_decoder(
    path: Path, build: BuildConfig, config: TorchDecoderConfig | ProfileDecoderConfig
) -> Decoder:
    try:
        if isinstance(config, ProfileDecoderConfig):
            profile = load_profile(path / config.path)
            return ProfileDecoder(
                profile, build.max_batch_size, config.disturbance, config.seed, config.token
            )
        from perf.trtllm_fake.torch_model import TorchModel  # torch takes seconds to import

        model = TorchModel(_engine_config(path, build, config))
        return TorchDecoder(model, config.step_ms)
    except (ConfigError, ProfileError, TypeError) as error:
        raise EngineDirError(f"{path / 'rank0.engine'}: {error}") from None


def write_engine_dir(
    path: Path, build: BuildConfig, engine: FakeEngine, pretrained: dict[str, Any]
) -> None:
    """Writes `config.json` and the file of each rank."""
    description = EngineDescription(
        version=VERSION, pretrained_config=pretrained, build_config=build
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(description.model_dump_json(indent=2) + "\n")
    for rank in range(description.num_ranks):  # the first one computes
        (path / f"rank{rank}.engine").write_text(engine.model_dump_json(indent=2) + "\n")


def pretrained_config(
    shape: RandomModelConfig, max_position_embeddings: int, tp_size: int = 1
) -> dict[str, Any]:
    """`pretrained_config` of a Qwen3 as TensorRT-LLM's conversion writes it."""
    world = {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1, "cp_size": 1}
    return {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "dtype": "float32",
        "logits_dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_size": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "mapping": {**world, "gpus_per_node": 8},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def _engine_config(path: Path, build: BuildConfig, config: TorchDecoderConfig) -> TorchEngineConfig:
    """One embedded engine with room for every request on its own."""
    tokens_per_block = build.plugin_config.tokens_per_block
    return TorchEngineConfig(
        model_dir=config.model_dir and path / config.model_dir,
        random_model=config.random_model,
        num_threads=config.num_threads,
        tokens_per_block=tokens_per_block,
        num_kv_blocks=build.max_batch_size * -(-build.max_seq_len // tokens_per_block),
        max_batch_size=build.max_batch_size,
        max_seq_len=build.max_seq_len,
    )


def _read(path: Path, model: type[Any]) -> Any:
    try:
        return model.model_validate_json(path.read_text())
    except OSError as error:
        raise EngineDirError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise EngineDirError(
            f"{path} is not a fake engine: build one with `python -m perf.trtllm_fake.engine_dir`"
        ) from None
    except ValidationError as error:
        raise EngineDirError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


# ---- command line


def main(arguments: list[str] | None = None) -> int:
    """Writes an engine directory."""
    options = _parser().parse_args(arguments)
    try:
        build, engine = _build_of(options), _engine_of(options)
        pretrained = _pretrained_of(options, build)
        write_engine_dir(options.output_dir, build, engine, pretrained)
        description, engine = read_engine_dir(options.output_dir)
        create_decoder(options.output_dir, description, engine)
    except (ConfigError, EngineDirError, ValidationError, OSError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else error
        print(f"engine_dir: {reason}", file=sys.stderr)
        return 2
    print(f"wrote {options.output_dir}")
    return 0


def _build_of(options: argparse.Namespace) -> BuildConfig:
    return BuildConfig(
        max_input_len=options.max_input_len or options.max_seq_len - 1,
        max_seq_len=options.max_seq_len,
        max_batch_size=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        plugin_config=PluginConfig(tokens_per_block=options.tokens_per_block),
    )


def _engine_of(options: argparse.Namespace) -> FakeEngine:
    decoder: TorchDecoderConfig | ProfileDecoderConfig
    if options.profile is not None:
        decoder = ProfileDecoderConfig(
            path=options.profile.resolve(),
            disturbance=Disturbance(host_overhead_ms=options.host_ms),
        )
    else:
        decoder = TorchDecoderConfig(
            model_dir=options.checkpoint and options.checkpoint.resolve(),
            random_model=_shape_of(options),
            step_ms=options.step_ms,
        )
    return FakeEngine(drive=options.drive, num_kv_blocks=options.num_kv_blocks, decoder=decoder)


def _shape_of(options: argparse.Namespace) -> RandomModelConfig:
    names = RandomModelConfig.model_fields
    return RandomModelConfig(**{name: getattr(options, name) for name in names})


def _pretrained_of(options: argparse.Namespace, build: BuildConfig) -> dict[str, Any]:
    if options.checkpoint is None:
        return pretrained_config(_shape_of(options), build.max_seq_len)
    from taper_trtllm.engines.checkpoint import open_checkpoint

    shape = open_checkpoint(options.checkpoint).config
    known = {n: getattr(shape, n) for n in RandomModelConfig.model_fields if n != "seed"}
    return pretrained_config(RandomModelConfig(**known), shape.max_position_embeddings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.trtllm_fake.engine_dir", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True)
    add("--drive", choices=("threaded", "virtual"), default="threaded")
    add("--num-kv-blocks", type=int, default=4096)
    add("--tokens-per-block", type=int, default=32)
    add("--max-batch-size", type=int, default=64)
    add("--max-num-tokens", type=int, default=8192)
    add("--max-seq-len", type=int, default=4096)
    add("--max-input-len", type=int, help="default: one less than --max-seq-len")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--profile", type=Path, help="step times from a latency profile")
    what.add_argument("--checkpoint", type=Path, help="local Hugging Face directory of a Qwen3")
    add("--host-ms", type=float, default=0.0, help="host time per step, with --profile")
    add("--step-ms", type=float, help="fixed step time, without --profile")
    for name, field in RandomModelConfig.model_fields.items():
        add(f"--{name.replace('_', '-')}", type=int, default=field.default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
