"""Black-box tuning (BBT; Sun et al. 2022): CMA-ES in a random projection of a soft prompt, with forwards alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zorl.adapters import adapt
from zorl.baselines.problem import Fitted, NotApplicable, Problem, Report, answers_of, progress
from zorl.baselines.selection import Selection, look_at
from zorl.directions import derive_seed
from zorl.encoding import longest_input
from zorl.goal import Goal
from zorl.probe import CENTRE, Scores

POPULATION = 20  # candidates per generation
TOKENS = 50  # in the soft prompt, if the context has room
INTRINSIC_DIMENSION = 500  # the most that z may have; the paper chose it for a prompt of 51,200 numbers
_SHARE_OF_CONTEXT, _SHARE_OF_PROMPT, _FEWEST = 8, 100, 20
_SEEDS = 1 << 32


def fit(problem: Problem, report: Report | None = None) -> Fitted:
    """Moves a soft prompt p = p₀ + A z by CMA-ES on z; the model stays as it is.

    p₀ are embeddings of random tokens, and A is Gaussian, scaled to the model's embeddings as in BBTv2 (Sun et al. 2022b). A
    candidate costs one forward of a batch, and all candidates of a generation see the same batch. Fitness is the reward (with
    label words, its expectation under their probabilities), or cross entropy if there is no reward. The mean of the
    distribution is scored on the development rows ten times, and the best is kept; p₀ is one of them. When text is generated,
    peft leaves the positions to the model, which then counts padding as well.

    The prompt has `TOKENS` tokens, or an eighth of the context if that is less. z has a hundredth as many dimensions as the
    prompt has numbers, but at least 20 and at most `INTRINSIC_DIMENSION`.

    Raises:
        NotApplicable: the budget does not pay for one generation.
    """
    import cma

    generations = problem.budget // POPULATION
    if not generations:
        raise NotApplicable(
            f"a generation of BBT costs {POPULATION} forwards, and the budget is {problem.budget}; raise it"
        )
    base, tokenizer = problem.load()
    generator = torch.Generator().manual_seed(derive_seed(problem.seed, "bbt") % _SEEDS)
    model, soft = _with_soft_prompt(base, tokenizer, generator)
    policy = problem.policy(model, tokenizer)
    by_likelihood = problem.reward is None and bool(problem.prompt.labels)
    goal = Goal(rewards=None if by_likelihood else problem.rewards, loss="cross_entropy" if by_likelihood else None)
    objective = goal.objective(policy, label_column=problem.label_column)
    dimension = min(INTRINSIC_DIMENSION, max(_FEWEST, soft.numel() // _SHARE_OF_PROMPT), soft.numel())
    first = soft.detach().clone()
    # With z of unit variance, the numbers of A z vary as much as those of the model's own embeddings.
    scale = float(base.get_input_embeddings().weight.float().std()) / math.sqrt(dimension)
    projection = scale * torch.randn(soft.numel(), dimension, generator=generator)

    def write(z: Any) -> None:
        moved = (projection @ torch.as_tensor(z, dtype=torch.float32)).view_as(soft)
        soft.copy_(first + moved.to(soft.device))

    normal = np.random.default_rng([problem.seed, dimension]).standard_normal
    settings = {
        "popsize": POPULATION,
        "randn": lambda *shape: normal(shape),
        "seed": math.nan,  # keeps cma from seeding numpy's global generator
        "verbose": -9,
    }
    selection = Selection(problem, policy, {"prompt": soft})
    with torch.no_grad(), progress("BBT", generations * POPULATION, report) as spend:
        search = cma.CMAEvolutionStrategy(np.zeros(dimension), 1.0, settings)
        selection.look(generation=0)
        for generation, rows in zip(range(1, generations + 1), problem.batches(), strict=False):
            candidates = search.ask()
            fitness = []
            for z in candidates:
                write(z)
                asked = objective.ask(rows, [CENTRE], derive_seed(problem.seed, "bbt", generation)).answers
                assert isinstance(asked, Scores)
                fitness.append(-asked.values.nanmean().nan_to_num(nan=-math.inf).item())  # cma minimises
                spend(1)
            search.tell(candidates, fitness)
            if look_at(generation, generations):
                write(search.mean)
                selection.look(generation=generation)
    selection.to_best()
    chosen = {"tokens": len(soft), "dimension": dimension, **selection.chosen}
    return Fitted(partial(answers_of, policy), generations * POPULATION, chosen)


def _with_soft_prompt(base: Any, tokenizer: Any, generator: torch.Generator) -> tuple[Any, Tensor]:
    """The model with the embeddings of random tokens in front, and these embeddings, shape `(tokens, width)`."""
    from peft import PromptTuningConfig

    tokens = max(1, min(TOKENS, longest_input(base, tokenizer) // _SHARE_OF_CONTEXT))
    kind = "CAUSAL_LM" if base.can_generate() else "FEATURE_EXTRACTION"
    with torch.random.fork_rng():  # peft initialises the prompt at random
        model: Any = adapt(base, PromptTuningConfig(task_type=kind, num_virtual_tokens=tokens))
    soft: Tensor = model.prompt_encoder["default"].embedding.weight
    vocabulary = base.get_input_embeddings().weight
    drawn = torch.randint(len(vocabulary), (tokens,), generator=generator)
    with torch.no_grad():
        soft.copy_(vocabulary[drawn.to(vocabulary.device)])
    return model.eval(), soft
