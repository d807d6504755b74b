"""The same work in PyTorch and in llama.cpp."""

import random
import time

from common import MODEL
from rows import THREADS

LONG = 3.0  # seconds of a call that is not repeated: in it, what a first call sets up does not show


def best(call, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that sets things up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
        if taken[-1] > LONG:
            return min(taken)
    return min(taken[1:])


class Torch:
    """The model in bf16, and matrix products."""

    def __init__(self, matrices: list[tuple[int, int, int]]):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self.torch = torch
        self.base = AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32).bfloat16().eval()
        self.tokens = torch.randint(0, self.base.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
        normal = lambda *shape: torch.randn(shape, dtype=torch.bfloat16)
        self.operands = {(m, n, k): (normal(m, k), normal(n, k)) for m, n, k in matrices}

    def seconds(self, call, repeats: int) -> float:
        with self.torch.inference_mode():
            return best(call, repeats)

    def hidden_states_8x256(self, repeats: int) -> float:
        return 2048 / self.seconds(lambda: self.base.model(input_ids=self.tokens, use_cache=False), repeats)

    def prefill_512(self, repeats: int) -> float:
        tokens = self.tokens[:2].reshape(1, 512)
        return 512 / self.seconds(lambda: self.base.model(input_ids=tokens, use_cache=True), repeats)

    def matmul(self, m: int, n: int, k: int, repeats: int) -> float:
        """GFLOP/s."""
        x, weight = self.operands[m, n, k]
        count = max(1, int(5e9 / (m * n * k)))
        taken = self.seconds(lambda: [self.torch.nn.functional.linear(x, weight) for _ in range(count)], repeats) / count
        return 2 * m * n * k / taken / 1e9


class LlamaCpp:
    """llama.cpp on the same file, in its own number types."""

    def __init__(self):
        from llama_cpp import Llama, llama_get_logits_ith

        options = {"n_ctx": 1024, "n_batch": 512, "n_ubatch": 512, "n_threads": THREADS, "n_threads_batch": THREADS}
        # llama.cpp would choose flash attention itself; its Python package says no for it.
        self.llama = Llama(str(MODEL), verbose=False, flash_attn=True, **options)
        # What is asked for last is waited for.
        self.wait = lambda: llama_get_logits_ith(self.llama.ctx, -1)
        self.tokens = random.Random(0).choices(range(self.llama.n_vocab()), k=512)

    def run(self, calls: list[list[int]], afresh: bool) -> None:
        if afresh:
            self.llama.reset()
        for tokens in calls:
            self.llama.eval(tokens)
            self.wait()

    def prefill_512(self, repeats: int) -> float:
        return 512 / best(lambda: self.run([self.tokens], True), repeats)

    def decode(self, repeats: int) -> float:
        """Twenty tokens at a time, one after the other, from an empty cache on, as ours."""
        self.llama.reset()
        return 20 / best(lambda: self.run([self.tokens[:1]] * 20, False), repeats)
