"""``concierge``: a hotel guest's question → the note that answers it. All words are written for this project.

Guests seldom use the notes' own words: the base model finds the right note for half of the held-out
questions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from examples.tasks.task import Split

# Each: what the hotel says; what guests ask, of which the last three are held out.
_NOTES: Mapping[str, Sequence[str]] = {
    "Breakfast is served from seven to half past ten in the winter garden.": (
        "When can I eat in the morning?",
        "Until what time is the buffet open?",
        "Where do I get coffee and eggs after I wake up?",
        "Do I have to be up early to get a croissant?",
        "We sleep late; will there still be rolls at ten?",
        "From when on do you serve muesli?",
        "Which room is the morning meal in?",
        "Is there toast for early risers?",
    ),
    "The wireless network is called Guest; its password is on the card of your key.": (
        "How do I get online?",
        "My laptop finds no internet.",
        "What do I type in to use the wifi?",
        "My daughter wants to watch films on her tablet.",
        "I have to answer e-mails tonight.",
        "My phone shows no connection up here.",
        "Which login do I need for the web?",
        "I have a video call with my office at six.",
    ),
    "Please leave the room by eleven on the day of departure; later costs twenty euros.": (
        "When do we have to be out?",
        "Can I stay until the afternoon on my last day?",
        "At what time is check-out?",
        "Our plane goes at eight in the evening; may we keep the room?",
        "How long may I sleep in on Sunday before we go home?",
        "Is it all right if I hand in the key at noon?",
        "We want to go home after lunch; is that too late?",
        "What does it cost to keep the room a bit longer?",
    ),
    "Cars park behind the house for twelve euros a night; the gate opens with your key.": (
        "Where can I leave my car?",
        "Is there a garage?",
        "I came with a rented van; where does it go?",
        "What do you take for parking?",
        "The gate to the yard is closed; how do I drive in?",
        "I am still standing in the street with the engine running.",
        "Is there any space for our camper?",
        "Will I get a ticket if I leave my Volvo in front of the door?",
    ),
    "The pool on the top floor is open from eight to ten at night; children swim with an adult.": (
        "Where can I swim?",
        "May my son go into the water alone?",
        "Until when may one bathe up there?",
        "Did I see people in bathing suits in the lift?",
        "I want to do a few laps before dinner.",
        "Is the water on the roof warm?",
        "My girls brought their goggles; where do they dive?",
        "How late may we splash about?",
    ),
    "Fresh towels are brought every second day, or at once if you lay yours on the floor.": (
        "Can I have something dry to wipe my hands?",
        "My bath towel is dirty.",
        "How often do you change the linen in the bathroom?",
        "There is nothing to dry myself with after a shower.",
        "We need two more towels.",
        "Everything in our bathroom is wet.",
        "I spilled wine and used up all the bath sheets.",
        "Will somebody replace what we dried ourselves with?",
    ),
    "We keep luggage behind the desk for as long as you like, free of charge.": (
        "May I leave my suitcase here?",
        "Where do our bags go until the train leaves?",
        "I do not want to carry my backpack through town.",
        "Can you look after my trunk until Friday?",
        "Is there a room for bags?",
        "Our things are heavy, and the ferry sails only tonight.",
        "Could you watch these boxes for an hour?",
        "We come back next week; can the skis stay here?",
    ),
    "Dogs and cats are welcome for fifteen euros a night, but not in the restaurant.": (
        "May I bring my dog?",
        "Is a kitten a problem?",
        "What does it cost for my poodle?",
        "Can my pet sit under the table at dinner?",
        "My husband never travels without his terrier.",
        "Are animals allowed?",
        "I have a puppy with me.",
        "Does our old hound have to sleep outside?",
    ),
    "Each wardrobe has a safe; you choose its four digits yourself.": (
        "Where do I lock away my passport?",
        "How do I keep my jewels secure?",
        "I forgot the number of the little steel box.",
        "Is there a place where my cash cannot be stolen?",
        "I have a lot of money with me.",
        "My necklace is worth a fortune; where does it go at night?",
        "Which code opens the box in the closet?",
        "Can thieves get at my camera while I am out?",
    ),
    "A taxi comes within ten minutes when you dial 4; to the airport it costs forty euros.": (
        "How do I get to my plane?",
        "Can you call me a cab?",
        "What is the fare to the airport?",
        "I need a driver at five in the morning.",
        "Which number do I ring for a car with a driver?",
        "It rains, and my meeting is across town.",
        "My flight leaves at nine; who takes me there?",
        "Somebody should drive my mother to the terminal.",
    ),
    "Laundry that is in the bag by nine is back, washed and ironed, the same evening.": (
        "Who cleans my shirts?",
        "I need my suit pressed by tonight.",
        "Where do I put my dirty clothes?",
        "My trousers have a stain.",
        "Can I have socks washed?",
        "My blouse is full of creases, and the wedding is tomorrow.",
        "There is ketchup on my jacket.",
        "We have nothing fresh to wear any more.",
    ),
    "The gym in the cellar never closes; shoes with clean soles, please.": (
        "Where can I lift weights?",
        "Is there a treadmill?",
        "I want to train at midnight.",
        "May I go down and exercise in my trainers?",
        "How do I keep fit here?",
        "I cannot sleep and would like to work out.",
        "Do you have dumb-bells?",
        "My coach says that I must run five miles today.",
    ),
    "Radiators are set by the wheel at the window; an extra blanket lies on the top shelf.": (
        "It is cold in here.",
        "How do I turn the heating up?",
        "My wife is freezing.",
        "Is there another duvet?",
        "The room is much too hot.",
        "I wore my coat in bed last night.",
        "My feet are like ice.",
        "Where do I set how warm it gets?",
    ),
    "A doctor is on call day and night; dial 9, and we will send her to you.": (
        "I feel sick.",
        "My son has a fever.",
        "I think I broke my ankle on the stairs.",
        "Is there anybody who can look at a rash?",
        "My chest hurts.",
        "Grandfather is dizzy and looks pale.",
        "Who can give me something for a terrible headache?",
        "She has eaten nuts, and her face is swelling.",
    ),
    "The museum is two stops away by tram 7, which leaves from across the street.": (
        "How do I get to the paintings?",
        "Which tram goes to the museum?",
        "We would like to see some art.",
        "Where is the stop?",
        "Is the gallery far?",
        "We want to look at old masters this afternoon.",
        "Do we need to change to reach the exhibition?",
        "From where does number seven go?",
    ),
    "Dinner is from six to ten; please book a table before noon.": (
        "Can we eat here tonight?",
        "Is there a table for four this evening?",
        "Until when is the kitchen open at night?",
        "I would like to reserve for eight o'clock.",
        "Do you serve a hot meal after the theatre?",
        "We are hungry and it is nine in the evening.",
        "Could you put us by the window at seven?",
        "What time is supper?",
    ),
    "Cots and high chairs are free; tell us a day before.": (
        "We are coming with a baby.",
        "Where will our newborn sleep?",
        "Do you have a little bed with bars?",
        "Our toddler cannot sit at the table.",
        "Is there something for infants?",
        "Our twins are eight months old.",
        "My granddaughter needs a seat to be fed in.",
        "Can the little one have a crib?",
    ),
    "You may smoke on the terrace only; in rooms it costs a fine of a hundred euros.": (
        "Where can I have a cigarette?",
        "Is there an ashtray?",
        "May my husband light his pipe at the window?",
        "What happens if the alarm smells my cigar?",
        "Do you have rooms for smokers?",
        "I need a quick puff before bed.",
        "Is vaping in the bathroom all right?",
        "Somebody next door is burning tobacco.",
    ),
    "Pay by card or in cash at the desk; we send the bill by e-mail if you ask.": (
        "Can I pay with Visa?",
        "I need an invoice for my company.",
        "Do you take notes and coins?",
        "Where do I settle what I owe?",
        "May I have a receipt?",
        "My firm has to get the paperwork.",
        "Is American Express good here?",
        "How much is it all together, and how do I pay it?",
    ),
    "The lift does not go to the attic; we carry your things, or give you a room lower down.": (
        "I cannot climb stairs.",
        "My mother uses a wheelchair.",
        "Does the elevator reach the fifth floor?",
        "There are so many steps to our room.",
        "Who helps me up with my bags?",
        "My knee is bad and we sleep under the roof.",
        "Is there a way up without walking?",
        "He is on crutches; is the top floor a problem?",
    ),
}
_GREETINGS = ("", "", "Excuse me: ", "Good evening. ", "Hello! ", "One question. ")
_NUM_HELD_OUT = 3


def notes() -> list[str]:
    """What may be found."""
    return list(_NOTES)


def questions(split: Split) -> list[tuple[str, str]]:
    """The questions of a split with their notes, in the same order every time; for training, with greetings."""
    greetings = _GREETINGS[1:] if split is Split.TRAIN else ("",)
    pairs = [
        (greeting + question, note)
        for note, asked in _NOTES.items()
        for question in (asked[:-_NUM_HELD_OUT] if split is Split.TRAIN else asked[-_NUM_HELD_OUT:])
        for greeting in greetings
    ]
    random.Random(f"concierge {split.value}").shuffle(pairs)
    return pairs
