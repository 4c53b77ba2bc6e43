"""The engine: Llama 2, its sampler and its trainer. The names below are the public API."""

from engine.checkpoint import content_hash, load_checkpoint, read_config, save_checkpoint
from engine.config import PRESETS, LlamaConfig
from engine.copies import copy_in
from engine.errors import CheckpointError, InputError, NotBuiltError
from engine.llm import LLM
from engine.lora import LoRA, load_adapter, save_adapter
from engine.model import Llama, tree_attend
from engine.ops import backends, logprob_loss, token_logprobs
from engine.requests import CompletionOutput, RequestOutput
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer
from engine.train.batches import DPORow, SFTRow
from engine.train.config import DPOConfig, SFTConfig
from engine.train.heldout import Heldout
from engine.train.losses import chosen_nll, dpo_loss, ipo_loss, sft_loss
from engine.train.precision import compute_model
from engine.train.reference import cached_reference, load_reference, reference_gap, save_reference
from engine.train.state import clear_state
from engine.train.trainer import TrainingInterrupted, TrainResult, reference_logprobs, train
from engine.train.trl import rows_from_trl
from engine.tree import Edges, Pack, TokenTree
