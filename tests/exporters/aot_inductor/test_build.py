from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffkiln.bundle.native import COMPARE
from diffkiln.errors import ExportError, PathEscape
from diffkiln.exporters import toolchain
from diffkiln.exporters.aot_inductor import build as aot_inductor
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.program import REGION, Op, Ref
from diffkiln.runtime.engines.aot_inductor import AotInductorEngine
from diffkiln.runtime.self_test import self_test
from diffkiln.spec.targets import CPUS
from tests.exporters.regions import (
    CPU,
    Writer,
    block,
    block_of_math,
    built,
    convolution,
    engine_cache,
    heavy_convolution,
    int8_linear,
    stated,
    total,
)

LIBRARY = Path("data", "aotinductor", "model", "engine.so")


def never(*_: object, **__: object) -> None:
    raise AssertionError("something was compiled")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.slow
class TestBuilding:
    def test_only_what_the_loader_needs_travels(self) -> None:
        _, artefact = built(block)
        assert sorted(files(artefact.directory)) == [str(LIBRARY), str(LIBRARY.with_name("engine_metadata.json"))]

    def test_convolutions_with_heavy_weights_keep_their_layout_and_others_do_not(self) -> None:
        """Weights are inputs, and with channels last each call would copy them."""
        compiler = toolchain.find_compiler()
        for region, kept in ((heavy_convolution(), True), (convolution(), False)):
            options = aot_inductor._options(Lowering(region, CPU), compiler, Path("out"))
            assert (options.get("layout_optimization") is False) is kept
        region, artefact = built(heavy_convolution)
        engine = AotInductorEngine(artefact.directory, artefact.inputs)
        assert self_test(engine, region, {}, torch.device("cpu"), "the engine") < 1e-5

    def test_attention_is_lowered_by_the_kernel_that_the_region_names(self) -> None:
        """As the first engine here shows, torch's own choice on a CPU is its form of FlashAttention."""
        fused = b"scaled_dot_product_flash_attention_for_cpu"
        for make, has in ((block, True), (block_of_math, False)):
            _, artefact = built(make)
            assert (fused in (artefact.directory / LIBRARY).read_bytes()) is has
        region, artefact = built(block_of_math)
        engine = AotInductorEngine(artefact.directory, artefact.inputs)
        constants = {"gate": torch.rand(16, 1)}
        assert self_test(engine, region, constants, torch.device("cpu"), "the engine") < 1e-5

    def test_layouts_are_recorded_in_order(self) -> None:
        region, artefact = built(block)
        assert len(artefact.inputs) == 1 + len(region.weights) + 1
        assert stated(artefact.inputs)[0] == ("float32", (1, 16, 32), (512, 32, 1))
        assert artefact.inputs[1].shape == region.types[f"@{region.weights[0]}"].shape
        assert stated(artefact.inputs)[-1] == ("float32", (16, 1), (1, 1))
        # The transposed output is made contiguous: it is the next region's input.
        assert stated(artefact.outputs) == [
            ("float32", (1, 16, 32), (512, 32, 1)),
            ("float32", (1, 32, 16), (512, 16, 1)),
        ]

    def test_what_it_asks_of_the_machine_is_recorded(self) -> None:
        _, artefact = built(block)
        listing = subprocess.run(
            ["readelf", "-V", str(artefact.directory / LIBRARY)], capture_output=True, text=True, check=True
        ).stdout
        assert set(artefact.requires) >= {"glibc", "glibcxx"}
        for name, version in artefact.requires.items():
            assert f"{name.upper()}_{version}" in listing

    def test_same_bytes_elsewhere_and_without_precompiled_headers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        region, artefact = built(block)
        monkeypatch.setattr(toolchain._Shared, "header", lambda *_: None)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        again = AotInductor().export(Lowering(region, CPU), EngineCache(tmp_path / "another" / "cache"))
        assert files(again.directory) == files(artefact.directory)

    def test_no_place_or_build_id_is_in_it(self) -> None:
        _, artefact = built(block)
        library = (artefact.directory / LIBRARY).read_bytes()
        for place in (str(engine_cache().root), str(Path(torch.__file__).parent), "diffkiln-export-", os.getcwd()):
            assert place.encode() not in library
        sections = subprocess.run(
            ["readelf", "-SW", str(artefact.directory / LIBRARY)], capture_output=True, text=True, check=True
        ).stdout
        assert ".symtab" not in sections
        assert "build-id" not in sections
        assert ".debug" not in sections

    def test_uses_the_targets_instructions_and_no_others(self) -> None:
        _, artefact = built(block)
        code = subprocess.run(
            ["objdump", "-d", str(artefact.directory / LIBRARY)], capture_output=True, text=True, check=True
        ).stdout
        assert "%ymm" in code
        assert "%zmm" not in code
        assert "%k1" not in code

    def test_second_export_compiles_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        region, artefact = built(block)
        monkeypatch.setattr(aot_inductor, "_generate", never)
        monkeypatch.setattr(toolchain, "_call", never)
        assert AotInductor().export(Lowering(replace(region, name="Same"), CPU), engine_cache()) == artefact

    def test_damaged_entry_is_built_again(self) -> None:
        region, artefact = built(int8_linear)
        library = artefact.directory / LIBRARY
        good = library.read_bytes()
        library.chmod(library.stat().st_mode | stat.S_IWUSR)
        library.write_bytes(good[:-1] + b"\x01")
        assert AotInductor().export(Lowering(region, CPU), engine_cache()) == artefact
        assert library.read_bytes() == good

    def test_two_threads_may_export_at_once(self, tmp_path: Path) -> None:
        regions = [int8_linear(), total()]
        cache = EngineCache(tmp_path)
        built(int8_linear)
        shutil.copytree(engine_cache().toolchain, tmp_path / "toolchain")
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda region: AotInductor().export(Lowering(region, CPU), cache), regions))
        assert files(both[0].directory) == files(built(int8_linear)[1].directory)
        assert files(both[1].directory) == files(built(total)[1].directory)

    def test_damaged_precompiled_header_is_dropped(self, tmp_path: Path) -> None:
        compiler = toolchain.find_compiler()
        flags = toolchain.Flags(compiler, "x86-64-v3", ("-std=c++20",), ())
        header = tmp_path / "some.h"
        header.write_text("inline int one() { return 1; }\n")
        header.with_suffix(".h.gch").write_bytes(b"gpch")
        (tmp_path / "unit.cpp").write_text('#include "some.h"\nint two() { return one() + one(); }\n')
        assert toolchain._compile(flags, "-O0", "unit.cpp", tmp_path, header).is_file()

    def test_leaves_torch_as_it_was(self, tmp_path: Path) -> None:
        import torch._inductor.config as config
        from torch._inductor import cpu_vec_isa

        before = config.get_config_copy(), dict(config.aot_inductor.metadata), cpu_vec_isa.valid_vec_isa_list
        environment = dict(os.environ)
        aot_inductor._generate(Lowering(int8_linear(), CPU), toolchain.find_compiler(), tmp_path)
        after = config.get_config_copy(), dict(config.aot_inductor.metadata), cpu_vec_isa.valid_vec_isa_list
        assert after == before
        assert dict(os.environ) == environment

    def test_code_does_not_depend_on_the_builders_threads(self, tmp_path: Path) -> None:
        threads, sources = torch.get_num_threads(), []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                (tmp_path / str(count)).mkdir()
                folder = tmp_path / str(count)
                _, made = aot_inductor._generate(Lowering(total(), CPU), toolchain.find_compiler(), folder)
                sources.append(toolchain.take_apart(aot_inductor._one(made, ".cpp").read_text()).kernels)
        finally:
            torch.set_num_threads(threads)
        code = [source.partition("// Compile cmd")[0] for source in sources]
        assert code[0] == code[1]
        assert "#pragma omp parallel num_threads(std::min(64, omp_get_max_threads()))" in code[0]

    def test_scalar_code_for_the_oldest_instruction_set(self, tmp_path: Path) -> None:
        _, made = aot_inductor._generate(Lowering(block(), CPUS["cpu-x86-64-v2"]), toolchain.find_compiler(), tmp_path)
        sources = toolchain.take_apart(aot_inductor._one(made, ".cpp").read_text())
        assert "at::vec::Vectorized" not in sources.kernels

    def test_tracing_takes_no_memory_for_weights(self, tmp_path: Path) -> None:
        w = Writer()
        x, huge = w.value("%x", 1, 2**18), w.value("@weight", 2**20, 2**18)  # one TiB
        region = w.program("Huge", w.op("linear.default", x, huge))
        aot_inductor._generate(Lowering(region, CPU), toolchain.find_compiler(), tmp_path)


class TestTakingApart:
    def test_drops_the_checks_and_keeps_the_rest(self) -> None:
        interface = toolchain._INTERFACE.read_text()
        check = "AOTI_NOINLINE static void check_input_0(\n    H* h\n) {\n    if (x) {\n    }\n}\n"
        calls = "void __check() {\n    check_input_0(input_handles);\n}\n"
        run = "void AOTInductorModel::run_impl() {}\n"
        source = f"\n{toolchain._MODEL_HEADER}{interface}\n{check}{calls}{run}{toolchain._KERNEL_HEADER}int kernel;\n"
        sources = toolchain.take_apart(source)
        assert "check_input" not in sources.model
        assert run in sources.model
        assert "kernel" not in sources.model
        assert sources.kernels == f"{toolchain._KERNEL_HEADER}int kernel;\n"
        assert sources.interface.startswith(toolchain._MODEL_HEADER)
        assert "Float8_e4m3fn.h" in sources.model  # torch 2.11's own header does not bring it

    def test_leaves_together_what_it_does_not_know(self) -> None:
        assert toolchain.take_apart("int main() {}\n") == toolchain.Sources("", "int main() {}\n", "")

    def test_the_runtime_decides_whether_a_gpus_engine_compares_layouts(self) -> None:
        asks = "static bool _check_aoti_runtime_check_inputs_env() {\n    return getenv(X);\n}\n"
        run = "void AOTInductorModel::run_impl() {}\n"
        for device in ("cuda", "cpu"):
            header = toolchain._MODEL_HEADERS[device]
            model = toolchain.take_apart(f"{header}{toolchain._INTERFACE.read_text()}\n{asks}{run}", device).model
            assert (f"void {COMPARE}(bool on)" in model) == (device == "cuda")
            assert ("getenv" in model) == (device == "cpu")

    def test_a_gpus_engine_has_kernels_of_its_own_and_no_loops(self) -> None:
        header = toolchain._MODEL_HEADERS["cuda"]
        run = "void AOTInductorModel::run_impl() {}\n"
        sources = toolchain.take_apart(f"{header}{toolchain._INTERFACE.read_text()}\n{run}", "cuda")
        assert sources.interface.startswith(header)
        assert sources.model.startswith(header)
        assert sources.kernels == ""
        assert sources.header == header


class TestRefusing:
    def reasons(self, problems: Sequence[object]) -> str:
        return "\n".join(map(str, problems))

    def test_accepts_what_it_can_build(self) -> None:
        assert not AotInductor().check(block(), CPU, {})

    def test_unknown_option(self) -> None:
        assert "$.level" in self.reasons(AotInductor().check(block(), CPU, {"level": 3}))

    def test_avx512_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
        newest = replace(CPU, isa="x86-64-v4")
        with pytest.raises(ExportError, match=r"'Block'.*\n.*no AVX-512"):
            AotInductor().export(Lowering(block(), newest), engine_cache())

    def test_region_with_a_call(self) -> None:
        region = block()
        call = Op(REGION, (Ref("%x"),), ("%call",), attrs={"region": "Other", "instance": "0"})
        assert "region" in self.reasons(AotInductor().check(replace(region, ops=(*region.ops, call)), CPU, {}))

    def test_missing_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ExportError, match="apt install g\\+\\+"):
            AotInductor().export(Lowering(block(), CPU), EngineCache(tmp_path))

    def test_broken_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\nexit 3\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(ExportError, match="CXX"):
            AotInductor().export(Lowering(block(), CPU), EngineCache(tmp_path))

    def test_compiler_that_fails(self, tmp_path: Path) -> None:
        flags = toolchain.Flags(toolchain.find_compiler(), "x86-64-v3", (), ())
        (tmp_path / "unit.cpp").write_text("int f() { return missing; }\n")
        with pytest.raises(ExportError, match=r"status 1:\n.*missing"):
            toolchain._compile(flags, "-O0", "unit.cpp", tmp_path)

    def test_region_that_inductor_cannot_lower(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("no such lowering\nmore")

        monkeypatch.setattr("torch._inductor.aot_compile", refuse)
        with pytest.raises(ExportError, match=r"'Block'.*RuntimeError: no such lowering\. Leave the component out"):
            AotInductor().export(Lowering(block(), CPU), EngineCache(tmp_path))

    def test_full_disk_or_unwritable_cache(self, tmp_path: Path) -> None:
        region, _ = built(block)
        shutil.copytree(engine_cache().toolchain, tmp_path / "toolchain")
        (tmp_path / "engines").write_text("")
        with pytest.raises(PathEscape, match="engines is not a real directory"):
            AotInductor().export(Lowering(region, CPU), EngineCache(tmp_path))
