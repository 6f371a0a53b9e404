"""What a vision-language model is asked, by its type: the words for each style, and how they go with a picture.

Models that chat are asked in plain words. Others know a few tasks, or none: they have only the styles that they can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT = "short"

_CHAT = {
    "short": "Say in one plain sentence what this picture shows. Name what is to be seen; leave out moods and guesses.",
    "detailed": "Describe this picture in three to five plain sentences: what is to be seen, how it looks, where it "
    "is, the light, the colours, the view and the medium. Leave out moods and guesses.",
    "tags": "List what this picture shows as 10 to 30 short tags in lower case with commas between, the most "
    "important first. Write nothing but the tags.",
    # what a caption says stays free to change, what it leaves out becomes part of the name
    "subject": "Write one plain sentence about this picture in which its main subject is called {trigger} and nothing "
    "else. Leave out what always belongs to {trigger}: its kind, shape, colours, face, hair and markings. Say what "
    "differs from picture to picture: pose, clothes, surroundings, light, view and medium.",
}


@dataclass(frozen=True)
class Manner:
    """How models of a type are asked: the prompt of each of `styles`, behind a `mark`, and whether as a `chat`.

    `boxes`: they answer some tasks with names and places.
    """

    styles: Mapping[str, str]
    chat: bool = False
    mark: str = ""
    boxes: bool = False


_OF_TYPE = {
    "blip": Manner({"short": ""}),
    "blip-2": Manner({"short": ""}),
    "florence2": Manner({"short": "<CAPTION>", "detailed": "<MORE_DETAILED_CAPTION>", "tags": "<OD>"}, boxes=True),
    "paligemma": Manner({"short": "caption en", "detailed": "describe en"}, mark="<image>"),
}


def manner_of(model_type: str) -> Manner:
    return _OF_TYPE.get(model_type, Manner(_CHAT, chat=True))
