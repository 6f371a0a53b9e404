"""What a source asks the base to draw: pictures of its own world, to be trained on so that they stay what they are.

Here: the settings. Who draws is `lorakit/verbs/class_pictures.py`; the pictures are then a source's like any others.
"""

from pydantic import Field

from lorakit.core.settings import Settings


class GenerateSettings(Settings):
    prompts: list[str] = Field(min_length=1)
    """What is drawn, in turns: each is its pictures' caption. Many different ones keep more than many of one."""
    count: int = Field(200, ge=1, le=100_000)
    """How many pictures there are to be. Of those that are missing the base draws each once, before the training."""
    negative_prompt: str = ""
    """What the guidance leads away from."""
    steps: int = Field(20, gt=0)
    """Denoising steps a picture."""
    guidance: float = Field(5.0, ge=0)
    """Scale of classifier-free guidance; a high one drives colours to extremes, which are then learnt."""
    seed: int = Field(0, ge=0)
    """Seed of the first picture; each further one takes the next."""
    sizes: list[tuple[int, int]] = Field(default_factory=list)
    """Widths and heights in pixels, in turns; empty: the model's own size."""
