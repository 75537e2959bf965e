"""``contact-json``: a free text with somebody's name, e-mail and phone → one JSON object.

All words, names and templates are written for this project. Addresses use the domains that RFC 2606 reserves,
phones the numbers that are reserved for fiction.
"""

from __future__ import annotations

import json
import random

from examples.tasks.task import ExampleTask, Item, Split, words
from manyhats.trainer.settings.methods import LoraSettings

_FIRST_NAMES = {
    Split.TRAIN: words(
        "Maria, James, Aisha, Peter, Chen, Olga, David, Fatima, Lars, Sofia, Kenji, Emma, Carlos, "
        "Priya, Noah, Ingrid, Samuel, Hana, Victor, Leila, Thomas, Amara, George, Yuki, Daniel, Rosa, "
        "Ivan, Grace, Omar, Julia, Felix, Nadia, Simon, Clara, Hugo, Mei, Paul, Zara, Andre, Ruth"
    ),
    Split.HELD_OUT: words(
        "Elena, Walter, Naomi, Arjun, Bruno, Greta, Mateo, Salma, Oscar, Wendy, Tariq, Lucia"
    ),
}
_LAST_NAMES = {
    Split.TRAIN: words(
        "Lopez, Smith, Khan, Novak, Wei, Petrova, Brown, Haddad, Olsen, Rossi, Tanaka, Jones, Garcia, "
        "Patel, Weber, Berg, Cohen, Sato, Moreau, Ahmadi, Miller, Okafor, Papadakis, Kim, Evans, "
        "Silva, Volkov, Murphy, Farouk, Keller, Wagner, Nasser, Clark, Fischer, Martin, Zhang, Dubois, "
        "Ali, Costa, Hill"
    ),
    Split.HELD_OUT: words(
        "Fernandez, Baker, Mwangi, Lindholm, Marino, Schultz, Nakamura, Reyes, Walsh, Iqbal, Horvat"
    ),
}
_ORGANISATIONS = {
    Split.TRAIN: words("mail, office, team, home, shop, lab, studio, contact"),
    Split.HELD_OUT: words("garden, clinic, school, museum"),
}
_TOP_LEVELS = ("example.com", "example.org", "example.net")

# One template per set of fields; {n}, {e} and {p} are name, e-mail and phone.
_ALL_FIELDS = (
    "Hi, this is {n}. You can reach me at {p} or {e}.",
    "Please send the invoice to {n} ({e}), phone {p}.",
    "{n} called from {p} and asked us to write to {e}.",
    "My new address is {e}. My number is still {p}. Best, {n}",
    "For questions about the flat, ask {n}: {p}, {e}.",
    "The driver's number is {p}; her name is {n} and her mail {e}.",
    "{e} belongs to {n}, who also answers the phone at {p}.",
    "Meeting on Monday with {n}. Phone: {p}. Mail: {e}.",
)
_NO_PHONE = (
    "You can write to {n} at {e} any time.",
    "The new teacher is {n}, {e}.",
    "I got a note from {e}, signed {n}.",
)
_NO_EMAIL = (
    "{n} has no computer, so please ring {p}.",
    "Call {n} at {p} before noon.",
    "The plumber, {n}, can be reached on {p}.",
)
_NO_NAME = (
    "Write to {e} or call {p} for tickets.",
    "The office is closed today; try {p} or {e}.",
)


def _draw(rng: random.Random, split: Split) -> Item:
    first, last = rng.choice(_FIRST_NAMES[split]), rng.choice(_LAST_NAMES[split])
    templates = rng.choices((_ALL_FIELDS, _NO_PHONE, _NO_EMAIL, _NO_NAME), weights=(7, 1, 1, 1))[0]
    template = rng.choice(templates)
    fields = {"n": f"{first} {last}", "e": _draw_email(rng, split, first, last), "p": _draw_phone(rng)}
    found = {
        "name": fields["n"] if "{n}" in template else None,
        "email": fields["e"] if "{e}" in template else None,
        "phone": fields["p"] if "{p}" in template else None,
    }
    return Item(template.format(**fields), json.dumps(found))


def _draw_email(rng: random.Random, split: Split, first: str, last: str) -> str:
    user = rng.choice((f"{first}.{last}", first, f"{first[0]}.{last}", f"{last}{rng.randint(1, 99)}"))
    domain = rng.choice(_TOP_LEVELS)
    if rng.random() < 0.3:
        domain = f"{rng.choice(_ORGANISATIONS[split])}.{domain}"
    return f"{user.lower()}@{domain}"


def _draw_phone(rng: random.Random) -> str:
    line = f"01{rng.randint(0, 99):02d}"
    return rng.choice(("555-{}", "555 {}", "+1 555 {}", "(212) 555-{}", "020 7946 {}")).format(line)


def _is_right(answer: str, wanted: str) -> bool:
    """The same object, wherever in the answer it stands and however it is spaced."""
    begin, end = answer.find("{"), answer.rfind("}")
    try:
        return bool(json.loads(answer[begin : end + 1]) == json.loads(wanted))
    except ValueError:
        return False


CONTACT_JSON = ExampleTask(
    name="contact-json",
    summary="Takes name, e-mail and phone out of a text, as one JSON object with `null` for what is missing.",
    data="Sixteen sentence patterns filled with names, reserved e-mail domains and fictional phone numbers. "
    "First names, last names and mail subdomains of the held-out items are never trained on.",
    instruction="Extract the contact in this text as a JSON object with exactly the keys name, email and "
    "phone. Use null for what is missing. Answer with the JSON object only.\n\n{}",
    max_new_tokens=64,
    draw=_draw,
    is_right=_is_right,
    adapter=LoraSettings(rank=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    num_train=1280,
    demo="Hello, Wendy Marino here. My mail is wendy.m@example.org, or ring 555-0147 after six.",
)
