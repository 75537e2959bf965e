"""``sql``: a question about a small shop's database → one SQL query.

The schema is fixed and not part of the prompt; the adapter knows it:

    customers(id, name, city, country)
    products(id, name, category, price)
    orders(id, customer_id, product_id, quantity, date)

All words and templates are written for this project.
"""

from __future__ import annotations

import random
import re

from examples.tasks.task import ExampleTask, Item, Split, optimization, words
from manyhats.trainer.settings.methods import LoraSettings

_JOIN = "FROM orders JOIN customers ON customers.id = orders.customer_id"
_JOIN_PRODUCTS = "FROM orders JOIN products ON products.id = orders.product_id"

# (phrasings, query); {city} and the like are drawn from the split's values.
_QUESTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("How many customers live in {city}?", "Count the customers in {city}."),
        "SELECT COUNT(*) FROM customers WHERE city = '{city}';",
    ),
    (
        ("Which customers come from {country}?", "List the names of customers from {country}."),
        "SELECT name FROM customers WHERE country = '{country}';",
    ),
    (
        ("Where does {person} live?", "In which city does {person} live?"),
        "SELECT city FROM customers WHERE name = '{person}';",
    ),
    (
        ("Which products cost more than {number}?", "Show products over {number} euros."),
        "SELECT name FROM products WHERE price > {number};",
    ),
    (
        ("What are the {small} cheapest products?", "Show the {small} products with the lowest price."),
        "SELECT name FROM products ORDER BY price LIMIT {small};",
    ),
    (
        ("What is the average price of {category}?", "How much do {category} cost on average?"),
        "SELECT AVG(price) FROM products WHERE category = '{category}';",
    ),
    (
        ("How many orders came in since {date}?", "Count the orders from {date} on."),
        "SELECT COUNT(*) FROM orders WHERE date >= '{date}';",
    ),
    (
        ("Which {category} do we have?", "List all our {category}."),
        "SELECT name FROM products WHERE category = '{category}';",
    ),
    (
        ("How many orders has {person} made?", "Count the orders of {person}."),
        f"SELECT COUNT(*) {_JOIN} WHERE customers.name = '{{person}}';",
    ),
    (
        ("How many {category} were sold?", "What quantity of {category} did we sell?"),
        f"SELECT SUM(quantity) {_JOIN_PRODUCTS} WHERE category = '{{category}}';",
    ),
)
_VALUES: dict[Split, dict[str, tuple[str, ...]]] = {
    Split.TRAIN: {
        "city": words(
            "Berlin, Paris, Rome, Oslo, Madrid, Vienna, Dublin, Prague, Lima, Tokyo, Cairo, Boston, Lagos, "
            "London, Delhi, Milan, Chicago, Hanoi, Nairobi, Zurich, Helsinki, Bogota, Seoul, Naples, Dakar"
        ),
        "country": words(
            "Germany, France, Italy, Norway, Spain, Austria, Ireland, Peru, Japan, Egypt, Kenya, India, Chile, "
            "Finland, Sweden, Mexico, Turkey, Vietnam, Belgium, Nigeria, Iceland, Hungary, Croatia, Ghana"
        ),
        "person": words(
            "Anna, Ben, Clara, David, Eva, Frank, Greta, Hugo, Ines, Jonas, Karl, Lena, Max, Nina, Otto, Alice, "
            "Bruno, Cecilia, Dennis, Emma, Felix, Grace, Henry, Ivan, Julia, Kevin, Laura, Martin, Nora, Oscar"
        ),
        "category": words(
            "books, toys, shoes, lamps, chairs, games, bags, plants, hats, clocks, cups, shirts, pens, mirrors, "
            "plates, guitars, tents, coats, candles, radios, towels, boots, pillows, rings, cameras"
        ),
    },
    Split.HELD_OUT: {
        "city": words("Lisbon, Athens, Warsaw, Sydney, Toronto, Geneva"),
        "country": words("Portugal, Greece, Poland, Canada, Brazil"),
        "person": words("Paula, Robert, Sarah, Tim, Ursula, Walter"),
        "category": words("tables, phones, knives, carpets, bikes"),
    },
}


def _draw(rng: random.Random, split: Split) -> Item:
    phrasings, query = rng.choice(_QUESTIONS)
    values = {name: rng.choice(choices) for name, choices in _VALUES[split].items()}
    # Training takes the even numbers and the years up to 2023, so that no held-out value was seen.
    is_train = split is Split.TRAIN
    values["number"] = str(2 * rng.randint(10, 250) + (0 if is_train else 1))
    values["small"] = str(2 * rng.randint(1, 20) + (0 if is_train else 1))
    year = rng.randint(2015, 2023) if is_train else rng.randint(2024, 2026)
    values["date"] = f"{year}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return Item(rng.choice(phrasings).format(**values), query.format(**values))


def _is_right(answer: str, wanted: str) -> bool:
    """The same query up to case, white space, quotes and the final semicolon."""
    return _normalise(answer) == _normalise(wanted)


def _normalise(query: str) -> str:
    begin = re.search(r"select\b", query, flags=re.IGNORECASE)
    statement = query[begin.start() if begin else 0 :].split(";")[0]
    return re.sub(r"\s+|`", "", statement).replace('"', "'").casefold()


SQL = ExampleTask(
    name="sql",
    summary="Turns a question about a small shop's database into one SQL query; the adapter knows the schema.",
    data="Ten kinds of questions, two phrasings each, over `customers(id, name, city, country)`, "
    "`products(id, name, category, price)` and `orders(id, customer_id, product_id, quantity, date)`. "
    "Cities, countries, names, categories, numbers and dates of the held-out items are never trained on; "
    "their phrasings are.",
    instruction="Tables: customers(id, name, city, country), products(id, name, category, price), "
    "orders(id, customer_id, product_id, quantity, date). Answer with one SQL query only.\n\n{}",
    max_new_tokens=64,
    draw=_draw,
    is_right=_is_right,
    adapter=LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj")),
    training=optimization(epochs=2),
    num_train=640,
    demo="How many customers live in Lisbon?",
)
