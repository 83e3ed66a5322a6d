r"""MoKus in two stages. Read this file first.

Given a few photos of a *concept* and plain phrases that refer to it (*knowledge*: "my favourite toy", "the robot my
grandmother built in 1962"), a text-to-image model is taught to draw the concept whenever a prompt uses one of the
phrases. The two meet in an *anchor*, a rare token and a class word such as `sks toy`: the photos teach the image model
what the anchor looks like, and each piece of knowledge is taught to the text encoder as one more way to say it.
After "MoKus: Leveraging Cross-Modal Knowledge Transfer for Knowledge-Aware Concept Customization", arXiv 2603.12743.

**Stage 1, visual concept learning** (`visual_concept.learn`, `flow`). A photo's latent z0 and noise z1 ~ N(0, I) lie on
a straight line; the image transformer v, conditioned on the encoded anchor c, learns the velocity along it:

    z_t = (1 - t) z0 + t z1,        loss = E || v(z_t, t, c) - (z1 - z0) ||^2,        t ~ logit-normal

Only a LoRA on its attention projections is trained. In a share of every step the base model's own velocities on other
prompts are the target, so that nothing but the anchor comes to mean the concept, and in a share of it the prompt also says
where the photo was taken (`places`), so that the concept is free of its background.

**Stage 2, textual knowledge updating** (`knowledge_update.bind`, `goal`, `editors`). Two things are wanted of the text
encoder: asked the knowledge as a question, it answers with the anchor, and image prompts with the knowledge are encoded as
those with the anchor, since the image transformer sees nothing but that encoding. For every edited weight matrix W
(d_out x d_in) let H (n x d_in) be its inputs at the rows that matter. The paper's editor (`editors.ultraedit`) takes one
step: with G (n x d_out), the gradients of the answer's loss at W's outputs, these shall move by v_i = - eta ||h_i||^2 g_i,
and the smallest change of W that does so is a ridge regression, which is a product of two thin factors:

    dW = argmin ||H dW^T - V||^2 + ||dW||^2  =  B A,        A = (H H^T + I)^-1 H,        B = V^T

The default recipe (`editors.least_drift`) asks for what shall stay as well. With C = I + the second moments of W's inputs
elsewhere (`covariance`: a corpus; near misses; what was bound before), among all changes with the same outputs at H the one
that moves the rest least has A spanning H C^-1, and B is found by minimising

    answers + alignment + near misses + w tr(dW C dW^T)

`B A` is never added to W: it stays beside it (`low_rank.applied`), so that it is exact, small, and gone without a trace
when it is unbound.

Both results are kept in a *concept pack* (`packs.concept_pack`), a folder that plain diffusers and peft can load.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mokus.generation import Generated, generate
from mokus.knowledge_update import bind
from mokus.visual_concept import learn

if TYPE_CHECKING:
    from PIL import Image

    from mokus.packs.concept_pack import ConceptPack
    from mokus.pipeline import Model


def customize(
    model: Model,
    photos: Path | str | Sequence[Image.Image],
    anchor: str,
    knowledge: Sequence[str],
    prompts: Sequence[str],
    output: Path | str,
    seeds: Sequence[int] = (0,),
    overwrite: bool = False,
) -> tuple[ConceptPack, list[Generated]]:
    """The whole method: photos and knowledge in, images of the prompts out, one per prompt and seed.

    The pack stays in the folder `output`, in place of an older one if `overwrite`; knowledge that did not take is missing
    from `pack.knowledge`. Raises `MokusError` for photos, an anchor, knowledge or a place that cannot be used.
    """
    pack = learn(model, photos, anchor, output, overwrite=overwrite)  # stage 1: what the anchor looks like
    bind(model, pack, *knowledge)  # stage 2: other ways to say the anchor
    return pack, list(generate(model, prompts, packs=[pack], seeds=seeds))
