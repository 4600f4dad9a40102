"""Build llama.cpp for this CPU and write the language model of Qwen-VL for it, with random weights.

    python -m benchmarks.peers.llama_build --work DIR      # prints the two paths that `benchmarks.peers --llama` needs
    python -m benchmarks.peers.llama_build --work DIR --isa avx2     # for a comparison under QVL_CPU_ISA=avx2

llama.cpp has no vision encoder for this model; its decoder is "qwen" with a fused qkv. Weights are Q4_0, the
head Q6_K, as its users run it. The source is that inside the sdist of llama-cpp-python, so it needs PyPI alone; a build
takes about 4 minutes on two cores, DIR some 9 GB. Files of an earlier build are reused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA_CPP_PYTHON, GGUF = "0.3.36", "0.19.0"
HIDDEN, LAYERS, HEADS, MLP, VOCABULARY, CONTEXT = 4096, 32, 32, 11008, 151936, 8192
HERE = Path(__file__).parent
# What GGML's build switches on for each of the runtime's instruction sets; "native" leaves it to the compiler.
AVX2 = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")
INSTRUCTION_SETS = {
    "native": (),
    "avx512": (*AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
    "avxvnni": (*AVX2, "AVX_VNNI"),
    "avx2": AVX2,
}
# g++ 12 takes `_tile_loadconfig` for a read of 8 of its 64 bytes and removes the stores of the others as dead;
# the first product of many rows on AMX then ends the process.
KEEP_STORES = "-fno-tree-dse -fno-dse"
LIBRARIES = ("libllama.a", "libggml.a", "libggml-cpu.a", "libggml-base.a")


def run(*command: object) -> None:
    """Run a command; raises `SystemExit` with the end of its output if it fails."""
    print("+", *command, file=sys.stderr)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def environment(work: Path) -> Path:
    """The Python of a virtual environment with gguf and cmake, which is created if it is missing."""
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", work / "venv")
        run(python, "-m", "pip", "install", "-q", f"gguf=={GGUF}", "numpy", "cmake")
    return python


def server(work: Path, python: Path, isa: str = "native") -> Path:
    """The program that keeps the model loaded and times commands, llama_serve.cpp, for an instruction set."""
    name = "llama_serve" if isa == "native" else f"llama_serve-{isa}"
    built = work / name
    if built.exists():
        return built
    source = work / f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    if not source.exists():
        release = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", work, release)
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    build = work / name.replace("serve", "build")
    llama, cmake = source / "vendor" / "llama.cpp", python.parent / "cmake"
    off = [
        f"-D{name}=OFF"
        for name in (
            "BUILD_SHARED_LIBS",
            "LLAMA_CURL",
            "LLAMA_OPENSSL",
            "LLAMA_BUILD_TESTS",
            "LLAMA_BUILD_EXAMPLES",
            "LLAMA_BUILD_SERVER",
        )
    ]
    on = [f"-DGGML_{feature}=ON" for feature in INSTRUCTION_SETS[isa]]
    native = "ON" if isa == "native" else "OFF"
    tiles = [f"-DCMAKE_CXX_FLAGS={KEEP_STORES}"] if isa == "native" else []
    run(cmake, "-S", llama, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DGGML_NATIVE={native}", *tiles, *on, *off)
    run(cmake, "--build", build, "--target", "llama", f"-j{os.cpu_count()}")
    libraries = [next(build.rglob(name)) for name in LIBRARIES]
    includes = [f"-I{llama / 'include'}", f"-I{llama / 'ggml' / 'include'}"]
    run(
        "g++",
        "-O2",
        "-std=c++17",
        *includes,
        HERE / "llama_serve.cpp",
        "-o",
        built,
        *libraries,
        "-fopenmp",
        "-lpthread",
        "-ldl",
    )
    return built


def write_gguf(path: Path) -> None:
    """Runs in the environment that has gguf; one layer's random blocks are written for every layer."""
    import gguf
    import numpy as np

    rng, kinds = np.random.default_rng(0), gguf.GGMLQuantizationType

    def q4_0(outputs: int, inputs: int) -> np.ndarray:
        blocks = rng.integers(0, 256, (outputs, inputs // 32, 18), dtype=np.uint8)
        scales = np.full((outputs, inputs // 32), 0.25 / np.sqrt(inputs), np.float16)
        blocks[:, :, :2] = scales[..., None].view(np.uint8)
        return blocks.reshape(outputs, -1)

    def q6_k(outputs: int, inputs: int) -> np.ndarray:
        blocks = rng.integers(0, 256, (outputs, inputs // 256, 210), dtype=np.uint8)
        blocks[:, :, 192:208] = rng.integers(16, 48, (outputs, inputs // 256, 16), dtype=np.uint8)
        scales = np.full((outputs, inputs // 256), 0.002 / np.sqrt(inputs), np.float16)
        blocks[:, :, 208:] = scales[..., None].view(np.uint8)
        return blocks.reshape(outputs, -1)

    writer = gguf.GGUFWriter(str(path), "qwen")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * MLP)  # llama.cpp's qwen halves it
    writer.add_head_count(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(2)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    ones, zeros = np.ones(HIDDEN, np.float32), np.zeros(3 * HIDDEN, np.float32)
    writer.add_tensor("token_embd.weight", q4_0(VOCABULARY, HIDDEN), raw_dtype=kinds.Q4_0)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", q6_k(VOCABULARY, HIDDEN), raw_dtype=kinds.Q6_K)
    shapes = {
        "attn_qkv": (3 * HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (MLP, HIDDEN),
        "ffn_up": (MLP, HIDDEN),
        "ffn_down": (HIDDEN, MLP),
    }
    linears = {name: q4_0(*shape) for name, shape in shapes.items()}
    for layer in range(LAYERS):
        for name, blocks in linears.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=kinds.Q4_0)
        writer.add_tensor(f"blk.{layer}.attn_qkv.bias", zeros)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Build what is missing and print the paths of the server and of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder to build in and to keep the model in")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, default="native", help="the instruction set to build for")
    parser.add_argument("--write-gguf", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_gguf:
        write_gguf(args.write_gguf)
        return
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = environment(work)
    serve, model = server(work, python, args.isa), work / "random-qwen7b-q4_0-head-q6_k.gguf"
    if not model.exists():
        partial = model.with_suffix(".partial")
        run(python, HERE / "llama_build.py", "--work", work, "--write-gguf", partial)
        partial.rename(model)
    print(serve, model)


if __name__ == "__main__":
    main()
