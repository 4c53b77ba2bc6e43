"""`token_logprobs` as the head of somebody else's model, in a plain PyTorch loop: log-probs and gradients, never logits.

    python examples/token_logprobs_loop.py

The body here is a GRU; any module does that gives hidden states [N, dim] and has a head of [vocab, dim]. A batch holds at
most 64 MB of logits at a time (the whole of it would be N * vocab * 4 bytes, three times over with its gradient), and the
gradient reaches both hidden states and head.
"""

import torch

from engine import token_logprobs

VOCAB, DIM = 97, 32


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, DIM)
        self.mix = torch.nn.GRU(DIM, DIM, batch_first=True)
        self.head = torch.nn.Linear(DIM, VOCAB, bias=False)  # its weight is all that is used of it

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(tokens))[0]  # [sequences, length, dim]


def main(steps: int = 60) -> tuple[float, float]:
    """The loss of the first and of the last step."""
    torch.manual_seed(0)
    model = Body()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    tokens = torch.randint(VOCAB, (8, 16))
    losses = []
    for _ in range(steps):
        hidden = model(tokens[:, :-1]).flatten(0, 1)  # [N, dim]
        logp, _ = token_logprobs(hidden, model.head.weight, tokens[:, 1:].flatten())  # [N]
        loss = -logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"loss {first:.3f} -> {last:.3f} (uniform: {torch.tensor(VOCAB).log():.3f})")
