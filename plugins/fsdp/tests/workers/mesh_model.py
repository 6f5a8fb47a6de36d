"""A small causal transformer, its data and loop, and the same in plain PyTorch, for meshes of processes."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torchport import Accelerator, DataLoaderConfiguration
from torchport.state import AcceleratorState

WIDTH, HEADS, VOCABULARY, LENGTH, BATCH, LR = 16, 4, 29, 16, 4, 0.02
PLAN = {
    "blocks.*.query": "colwise",
    "blocks.*.key": "colwise",
    "blocks.*.value": "colwise",
    "blocks.*.out": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
}


class Block(nn.Module):
    def __init__(self, key_heads: int, causal: bool, heads: int) -> None:
        super().__init__()
        each = WIDTH // heads
        self.each, self.causal, self.grouped = each, causal, key_heads != heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, key_heads * each), nn.Linear(WIDTH, key_heads * each)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        normed = self.norm1(x)
        heads = [
            layer(normed).unflatten(-1, (-1, self.each)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(*heads, is_causal=self.causal, enable_gqa=self.grouped)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(
        self, seed: int = 0, key_heads: int = HEADS, causal: bool = True, tp_plan=None, heads=HEADS
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(key_heads, causal, heads) for _ in range(1))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        if tp_plan is not None:
            self._tp_plan = tp_plan

    def forward(self, tokens, positions):
        x = self.embed(tokens) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rows(steps: int, length: int = LENGTH) -> torch.utils.data.TensorDataset:
    """Tokens, what comes next, and positions: `BATCH` sequences a step. Some targets do not count."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (steps * BATCH, length + 1), generator=generator)
    places = torch.arange(length).expand(len(tokens), -1)
    return torch.utils.data.TensorDataset(tokens[:, :-1].clone(), tokens[:, 1:].clone(), places.clone())


def padded(steps: int) -> torch.utils.data.TensorDataset:
    """The same, where sequences have ends that do not count, of different lengths."""
    tokens, targets, places = rows(steps).tensors
    ends = torch.randint(3, LENGTH + 1, (len(tokens), 1), generator=torch.Generator().manual_seed(8))
    targets[places >= ends] = -100
    return torch.utils.data.TensorDataset(tokens, targets, places)


def loss_of(model, tokens, targets, places, reduction="mean"):
    logits = model(tokens, places).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)


def plain(model=None, steps=6, accumulate=1, clip=None, dtype=None, data=None, by_token=False):
    """Losses, and norms of gradients, of one process that has every batch as a whole."""
    model = model or Transformer()
    model = copy.deepcopy(model)
    optimizer, losses, norms = optimizer_of(model), [], []
    loader = list(torch.utils.data.DataLoader(data or rows(steps), batch_size=BATCH))
    for start in range(0, len(loader), accumulate):
        window = loader[start : start + accumulate]
        items = sum(int((targets != -100).sum()) for _, targets, _ in window)
        for batch in window:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(model, *batch, reduction="sum" if by_token else "mean")
            losses.append(loss.item())
            (loss / (items if by_token else len(window))).backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms}


def prepared(mesh, *, strategy="fsdp", precision="no", accumulate=1, model=None, data=None, steps=6):
    """Open a run anew, with everything prepared; the loader cuts whole batches into parts."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        strategy=strategy,
        precision=precision,
        gradient_accumulation_steps=accumulate,
        parallelism_config=mesh,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    model = model or Transformer()
    loader = torch.utils.data.DataLoader(data or rows(steps), batch_size=BATCH)
    return accelerator, *accelerator.prepare(model, optimizer_of(model), loader)


def train(accelerator, model, optimizer, loader, *, clip=None, by_token=False):
    """The loop that users write; losses are means over all processes."""
    losses, norms = [], []
    for tokens, targets, places in loader:
        buffers = [tokens, targets, places]
        with accelerator.maybe_context_parallel(
            buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
        ):
            items = (targets != -100).sum() if by_token else None
            with accelerator.accumulate(model, num_items=items, reduction="sum" if by_token else "mean"):
                loss = loss_of(model, tokens, targets, places, "sum" if by_token else "mean")
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), clip).item())
                optimizer.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return {"losses": losses, "norms": norms}


def run(mesh, *, clip=None, by_token=False, **more):
    return train(*prepared(mesh, **more), clip=clip, by_token=by_token)
