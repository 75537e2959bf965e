"""``language``: a short text → the language it is in. All sentences are written for this project."""

from __future__ import annotations

import random

from examples.tasks.task import ExampleTask, Item, Split, label_judge, optimization, words
from manyhats.trainer.settings.methods import PromptSettings

# Each: beginnings, and what may follow any of them; of training and of held-out items.
_PARTS = {
    "english": {
        Split.TRAIN: (
            words(
                "We are looking for, She has bought, I do not know, They are selling, Where is, Have you seen"
            ),
            words("the old house, the new car, a good book, the letter, our garden, the bread, his brother"),
        ),
        Split.HELD_OUT: (
            words("He never found, I would like, Who has taken"),
            words("the bridge, my umbrella, the milk, her piano"),
        ),
    },
    "german": {
        Split.TRAIN: (
            words(
                "Wir suchen, Sie hat gestern, Ich kenne, Morgen verkaufen wir, Habt ihr schon, Hier sehen wir"
            ),
            words("das alte Haus, den neuen Wagen, ein gutes Buch, den Brief, unseren Garten, das Brot"),
        ),
        Split.HELD_OUT: (
            words("Niemand fand, Ich möchte, Wer nimmt"),
            words("die Brücke, meinen Regenschirm, die Milch, das Klavier"),
        ),
    },
    "french": {
        Split.TRAIN: (
            words("Nous cherchons, Elle a acheté, Je ne connais pas, Ils vendent, Où est, Avez-vous vu"),
            words("la vieille maison, la nouvelle voiture, un bon livre, la lettre, notre jardin, le pain"),
        ),
        Split.HELD_OUT: (
            words("Il n'a jamais trouvé, Je voudrais, Qui a pris"),
            words("le pont, mon parapluie, le lait, son piano"),
        ),
    },
    "spanish": {
        Split.TRAIN: (
            words("Buscamos, Ella ha comprado, No conozco, Ellos venden, Dónde está, Habéis visto"),
            words("la casa vieja, el coche nuevo, un buen libro, la carta, nuestro jardín, el pan"),
        ),
        Split.HELD_OUT: (
            words("Nunca encontró, Me gustaría, Quién ha tomado"),
            words("el puente, mi paraguas, la leche, su piano"),
        ),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    language = rng.choice(list(_PARTS))
    beginnings, rests = _PARTS[language][split]
    return Item(f"{rng.choice(beginnings)} {rng.choice(rests)}{rng.choice(('.', '!', '?', ' …'))}", language)


LANGUAGE = ExampleTask(
    name="language",
    summary="Names the language of a text: `english`, `german`, `french` or `spanish`.",
    data="Sentences of two parts in four languages. No part of a held-out item is trained on.",
    instruction="Is this english, german, french or spanish? Answer with one word.\n\n{}",
    max_new_tokens=8,
    draw=_draw,
    is_right=label_judge(tuple(_PARTS)),
    classes=tuple(_PARTS),
    adapter=PromptSettings(
        num_virtual_tokens=16,
        init="text",
        init_text="Name the language of the text: english, german, french or spanish. One word.",
    ),
    training=optimization(1e-2, epochs=2),
    num_train=480,
    demo="Ich möchte meinen Regenschirm!",
)
