"""Times training steps of GPT-2 124M (d12) in PyTorch on the CPU, float32.

    python3 dev/bench/torch_step.py eager|compiled B T STEPS THREADS      one line for each step: its seconds

The model is GPT-2 with PyTorch's own fused parts (scaled_dot_product_attention, cross_entropy, AdamW fused) on random
tokens. Two further steps come first and are not printed: allocation and, where asked for, compilation.
"""

import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

L, NH, C, MAX_T, V = 12, 12, 768, 1024, 50257
PADDED_V = 50304


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fc_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (h.view(B, T, NH, C // NH).transpose(1, 2) for h in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fc_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(PADDED_V, C), nn.Embedding(MAX_T, C)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.ln_f = nn.LayerNorm(C)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, PADDED_V), targets.view(-1))


def main():
    mode, (B, T, steps, threads) = sys.argv[1], map(int, sys.argv[2:6])
    torch.set_num_threads(threads)
    torch.manual_seed(42)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(model) if mode == "compiled" else model
    tokens, targets = torch.randint(V, (2, B, T))
    for step in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(tokens, targets).backward()
        optimizer.step()
        if step >= 2:
            print(f"{time.perf_counter() - start:.6f}", flush=True)


main()
