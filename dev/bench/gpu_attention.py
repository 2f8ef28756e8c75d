"""Our attention beside cuDNN's, in turns on this machine's GPU (part of `make bench-gpu-ops`).

    python3 dev/bench/gpu_attention.py [PROGRAM] [ROUNDS]      build/cuda_attention and 3 unless they are given

cuDNN's attention is called through PyTorch on the same packed (B, T, 3, NH, HS) tensors, bf16, causal: the forward pass
of `scaled_dot_product_attention`, and its backward pass alone, which need not be deterministic (ours is). A time is the
median of runs that rotate through buffers larger than the second-level cache. A ratio compares two times of one round;
printed are the medians of the times and the mean of the ratios with the smallest and the largest one.

Exit status: 0; 1 if something failed; without PyTorch one line says so and the status is 0.
"""

import re
import statistics
import subprocess
import sys

SHAPES = [(64, 12, 1024, 64), (32, 12, 2048, 64), (32, 16, 1024, 128), (8, 16, 4096, 128)]  # B, NH, T, HS
RUNS, SETS = 30, 3  # SETS: of buffers, more than 100 MB each


def our_times(program: str) -> dict[tuple, float]:
    """Microseconds by (pass, shape), from the lines of `PROGRAM time`."""
    output = subprocess.run([program, "time"], check=True, capture_output=True, text=True).stdout
    pattern = r"^(\w+)\s+B (\d+), (\d+) heads, T (\d+), d (\d+) +portable +([\d.]+) us[^H\n]*(?:Hopper +([\d.]+) us)?"
    return {
        (found[1], *map(int, found.group(2, 3, 4, 5))): float(found[7] or found[6])
        for found in re.finditer(pattern, output, re.MULTILINE)
    }


def median_us(torch, run) -> float:
    """Of RUNS runs, after a few that are not timed."""
    for i in range(5):
        run(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    marks[0].record()
    for i in range(RUNS):
        run(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


def cudnn_times(torch) -> dict[tuple, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times = {}
    for shape in SHAPES:
        B, NH, T, HS = shape
        sets = []
        for _ in range(SETS):
            qkv = torch.randn(B, T, 3, NH, HS, device="cuda", dtype=torch.bfloat16)
            inputs = [x.transpose(1, 2).detach().requires_grad_() for x in qkv.unbind(2)]
            sets.append((inputs, torch.randn(B, T, NH, HS, device="cuda", dtype=torch.bfloat16).transpose(1, 2)))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):

            def forward(i):
                return torch.nn.functional.scaled_dot_product_attention(*sets[i % SETS][0], is_causal=True)

            with torch.no_grad():
                times["forward", *shape] = median_us(torch, forward)
            outputs = [forward(i) for i in range(SETS)]

            def backward(i):
                inputs, gradient = sets[i % SETS]
                torch.autograd.grad(outputs[i % SETS], inputs, gradient, retain_graph=True)

            times["backward", *shape] = median_us(torch, backward)
    return times


def main() -> int:
    program = sys.argv[1] if len(sys.argv) > 1 else "build/cuda_attention"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    try:
        import torch
    except ImportError:
        print("cuDNN's attention is left out: this Python has no PyTorch (make ... PYTHON=another one)")
        return 0
    version = torch.backends.cudnn.version()
    print(f"{torch.cuda.get_device_name()}; cuDNN {version}, PyTorch {torch.__version__}; {rounds} rounds")
    print(f"{'attention':<44}{'ours':>10}{'cuDNN':>10}  its time / ours, least and most")
    ours, theirs = [], []
    for i in range(rounds):
        if i % 2 == 0:
            ours.append(our_times(program))
        theirs.append(cudnn_times(torch))
        if i % 2 == 1:
            ours.append(our_times(program))
    for key in theirs[0]:
        what, B, NH, T, HS = key
        ratios = [b[key] / a[key] for a, b in zip(ours, theirs)]
        a, b = (statistics.median(times[key] for times in runs) for runs in (ours, theirs))
        title = f"{what:<9}B {B}, {NH} heads, T {T}, d {HS}"
        spread = f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{title:<44}{a:>7.0f} us{b:>7.0f} us  {spread}")
    return 0


sys.exit(main())
