"""Our sampler as the generator beside a transformers model that somebody else trains, in one process.

    python examples/sampler_beside_transformers.py

Each step: sample answers, reward them, one policy-gradient step on the transformers model, hand its weights to the sampler.
`update_weights` takes transformers' state dict by its own names, copies in place and raises the weight epoch, so no key or
value of the old weights is found again. The sampled tokens come with the log-probs under which they were drawn, so the
trainer's can be compared with them in every step (here: to 1e-4 a token).
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine import LLM, SamplingParams

LIKED = 7  # the reward is the share of this token in an answer
PROMPTS = [[1, 5, 6], [1, 8], [1, 9, 4, 3]]


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=29, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def answer_logprobs(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return logp[len(prompt) - 1 :]


def main(steps: int = 15) -> tuple[list[float], float]:
    """The mean reward of every step, and how far apart sampler's and trainer's log-probs were at most."""
    model = policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        llm = LLM(directory, dtype="float32")
    rewards, gap = [], 0.0
    for step in range(steps):
        params = SamplingParams(n=8, max_tokens=6, seed=step, logprobs=1, ignore_eos=True)
        losses, found = [], []
        for output in llm.generate(PROMPTS, params):
            for answer in output.outputs:
                logp = answer_logprobs(model, output.prompt_token_ids, answer.token_ids)
                gap = max(gap, (logp.detach() - torch.tensor(answer.logprobs)).abs().max().item())
                found.append(answer.token_ids.count(LIKED) / len(answer.token_ids))
                losses.append(logp.sum())
        advantages = torch.tensor(found) - sum(found) / len(found)
        loss = -(advantages * torch.stack(losses)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        llm.update_weights(model.state_dict())
        rewards.append(sum(found) / len(found))
    return rewards, gap


if __name__ == "__main__":
    rewards, gap = main()
    print("mean reward:", " ".join(f"{reward:.2f}" for reward in rewards))
    print(f"sampler and trainer differ by at most {gap:.1e} nats a token")
