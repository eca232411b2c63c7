"""Messages to a shop and their topics, from templates: one part to train on, and one in other wordings to be held out.

    python examples/small_chat_model/topics.py FOLDER      # writes train.jsonl and held_out.jsonl

The two parts share neither a sentence nor a thing that was bought. Everything follows from a fixed seed.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product, zip_longest
from pathlib import Path

from stateset_lightning.files import atomic_write

SEED = 7
MESSAGES_PER_TOPIC = {"train": 160, "held_out": 70}

SLOTS = {
    "train": {
        "thing": ["kettle", "blue jacket", "desk lamp", "pair of boots", "garden hose", "rice cooker", "wool blanket"],
        "day": ["Monday", "Friday", "the 3rd", "12 May"],
        "number": ["10442", "A-771", "58-20", "3319"],
        "device": ["laptop", "tablet", "television"],
        "opening": ["", "Hello. ", "Good morning! "],
    },
    "held_out": {
        "thing": ["bookshelf", "phone case", "tent", "set of knives", "office chair", "raincoat", "hair dryer"],
        "day": ["Thursday", "Sunday", "the 21st", "8 June"],
        "number": ["20815", "B-064", "77-13", "9002"],
        "device": ["old computer", "new mobile", "work machine"],
        "opening": ["", "Hi! ", "Dear team, one question. "],
    },
}

# By topic: the sentences to train on, and the held-out ones.
TEMPLATES: dict[str, tuple[list[str], list[str]]] = {
    "delivery": (
        [
            "My {thing} has not arrived yet.",
            "Where is order {number}? I have been waiting since {day}.",
            "The courier says nobody was home, but I was here all day.",
            "Can you tell me when the {thing} will be here?",
            "Tracking for {number} has not moved since {day}.",
            "I need my parcel brought to another street than the one I gave.",
            "It was meant to come on {day} and there is still no {thing}.",
            "How long does shipping to the islands take?",
            "The driver left my {thing} with a neighbour I do not know.",
            "Nothing has come by post since {day}.",
            "Order {number} is late, is it on its way?",
            "Will somebody ring before they bring the {thing}?",
            "Is it possible to have the {thing} sent to my office?",
            "Your van never stopped at my door on {day}.",
            "Which courier brings parcel {number}?",
            "I am away on {day}, can the {thing} come a day later?",
            "My neighbour got his things today, but the {thing} has not come.",
            "What time do you bring parcels on {day}?",
            "Please hold {number} at the post office, I will fetch it there.",
            "The map says that the {thing} is in another country.",
            "Can somebody else sign for parcel {number}?",
            "I wrote the wrong house number for {number}, can it still get to me?",
            "Do you also ship to Norway?",
            "Could the {thing} be here before {day}?",
            "It says that {number} was handed over, but nobody gave me anything.",
            "The lorry could not get into my lane with the {thing}.",
            "Has the {thing} left your warehouse?",
            "I have had no word of parcel {number} since {day}.",
            "The {thing} was promised within two days, and a week has gone by.",
            "Somebody signed for {number}, and it was not me.",
            "Can a parcel be left in the garage?",
            "Your message says the {thing} is at a pick-up point. Which one?",
            "We stayed at home on {day}, but no courier rang the bell.",
            "How far away is the {thing} now?",
            "Please send {number} on to my new flat.",
            "The lift is out of order, will the {thing} be carried upstairs?",
        ],
        [
            "Still no sign of the {thing} I bought on {day}.",
            "Has package {number} been shipped?",
            "The van drove past my house without stopping, so I got no {thing}.",
            "Which day will somebody bring the {thing}?",
            "The post office has no record of {number}.",
            "Please drop the {thing} off at my workplace instead of at home.",
            "The {thing} should have been here on {day}.",
            "Nobody rang, and now package {number} is at the depot.",
            "Who is going to bring the {thing}, and when?",
            "I moved house. Can package {number} go to my new place?",
        ],
    ),
    "refund": (
        [
            "I sent the {thing} back and want my money.",
            "When do I get back what I paid for {number}?",
            "You promised to pay me back on {day}, and nothing came.",
            "I do not like the {thing}. Can I return it?",
            "How do I send back a {thing} that I never used?",
            "The jumper is too small, I would like my money back.",
            "I cancelled {number} on {day}, but the money is still with you.",
            "Is there a form for returns?",
            "You only gave me half of the price of the {thing} back.",
            "Please take back the {thing} and repay me.",
            "How many days do I have to return a {thing}?",
            "The shop received my return {number}, but I was not repaid.",
            "I would rather have my money than the {thing}.",
            "Where do I post a {thing} that I want to give back?",
            "The {thing} is different from the picture, so I am returning it.",
            "My return was accepted on {day}, when is it credited?",
            "Give me my money for {number}, please.",
            "I sent {number} back in its box, what happens now?",
            "May I bring the {thing} back to your shop?",
            "I want to end the purchase of {number} before it is sent.",
            "Who pays for the way back of a {thing}?",
            "The {thing} was a present, and she does not want it.",
            "Until {day} I could send it back, you said.",
            "I have a return label for {number}. Where is my credit?",
            "I ordered the wrong {thing}, take it back please.",
            "Since {day} I am waiting for the money for the {thing}.",
            "I no longer want the {thing}, what do I do with it?",
            "The credit for {number} never reached my bank.",
            "Returning the {thing} was free last year. Is it still?",
            "How long does it take until a return is paid out?",
            "I gave the parcel with the {thing} to the courier on {day} and wait for the sum.",
            "Please undo order {number}, I do not need it.",
            "Since the {thing} does not suit me, I want it off my bill and out of my house.",
            "Can I get store credit for the {thing} that I give back?",
            "My return {number} is at your warehouse. Pay me, please.",
            "Is it too late to give the {thing} back after {day}?",
        ],
        [
            "I changed my mind about the {thing} and want to give it back.",
            "The amount for returned order {number} is missing on my statement.",
            "Your warehouse got the {thing} on {day}. Where is my reimbursement?",
            "What is the deadline for giving back a {thing}?",
            "Please credit me for {number}, which I posted to you on {day}.",
            "The {thing} is not what I expected, so I want the price returned to me.",
            "I would like to undo my purchase of the {thing} and be paid back.",
            "Do I pay the postage when I send the {thing} back?",
            "It is weeks since I gave back {number}, and I have seen no money.",
            "Am I too late to return the {thing} from {day}?",
        ],
    ),
    "damage": (
        [
            "The {thing} came with a crack in it.",
            "My {thing} stopped working after one day.",
            "The box of {number} was crushed and all inside is broken.",
            "There is a deep scratch on the {thing}.",
            "Half of the screws for the {thing} are missing.",
            "The {thing} smells burnt when I switch it on.",
            "What I unpacked on {day} is in pieces.",
            "The zip was torn when I opened the bag.",
            "The {thing} leaks from below.",
            "The {thing} has a hole on one side.",
            "A button of the {thing} came off on {day}.",
            "The {thing} is faulty and makes strange sounds.",
            "There were bits of glass in parcel {number}.",
            "The paint of the {thing} is peeling off.",
            "The {thing} does not hold together any more.",
            "Something in the {thing} is loose and rattles.",
            "Parcel {number} was wet and so is the {thing}.",
            "The lid of the {thing} snapped.",
            "It arrived dented on {day}.",
            "The colour of the {thing} washed out at once.",
            "The screen stays black on my {device}, which I bought from you.",
            "The wheel of the {thing} is stuck.",
            "The {thing} burst when I filled it.",
            "The plug of the {thing} is melted.",
            "I found mould on the {thing}.",
            "My {thing} was repaired on {day} and is already out of order.",
            "The {thing} arrived broken.",
            "The handle of the {thing} fell off on {day}.",
            "My new {thing} does not turn on.",
            "The cloth of the {thing} has come apart.",
            "A piece of the {thing} is chipped.",
            "There are marks all over the {thing} that I cannot wipe off.",
            "The {thing} in {number} is defective.",
            "Since {day} my {thing} hums and shakes.",
            "One leg of the {thing} is shorter than the others.",
            "All the plates in {number} were smashed.",
        ],
        [
            "One corner of the {thing} is bent.",
            "The {thing} from order {number} fell apart on {day}.",
            "I opened parcel {number} and found shards.",
            "The seam of the {thing} is ripped.",
            "A part of the {thing} does not fit, it must be faulty.",
            "Since {day} the {thing} makes a grinding noise.",
            "The {thing} broke the first time I used it.",
            "There is a stain on the {thing} that will not go away.",
            "What came in {number} was shattered.",
            "The {thing} will not switch on any more.",
        ],
    ),
    "payment": (
        [
            "My card was charged twice for {number}.",
            "Can I pay for the {thing} in three instalments?",
            "The checkout says my card is declined.",
            "Do you take cheques?",
            "I was billed on {day} for something I did not order.",
            "Please send me the invoice for {number}.",
            "The voucher did not lower the price of the {thing}.",
            "Why does my bank show a different amount for the {thing}?",
            "I would like to settle {number} by bank transfer.",
            "The total of order {number} is higher than it said.",
            "May I buy the {thing} now and pay on {day}?",
            "My coupon does not work at the checkout.",
            "I paid {number} two times by mistake.",
            "What is the extra charge on my bill of {day}?",
            "Can I have a bill for the {thing} in the name of my firm?",
            "Which cards do you accept for a {thing}?",
            "How much is the tax on the {thing}?",
            "I got a reminder to pay {number}, which I have done.",
            "The gift card gives an error when I want to buy a {thing}.",
            "Do I have to pay before {day}?",
            "The price at the till was not that of the {thing}.",
            "Is cash all right when you bring {number}?",
            "Money left my bank on {day}, and I do not know why.",
            "I need a copy of the bill for {number}.",
            "Can the costs of {number} be split over some months?",
            "My card runs out on {day}, does it matter for {number}?",
            "Why was I charged for {number} again on {day}?",
            "Your site refuses my bank card.",
            "I cannot find a receipt for the {thing}.",
            "Does the {thing} cost more if I pay in parts?",
            "There is an amount on my statement of {day} that I do not recognise.",
            "The promotion code took nothing off the {thing}.",
            "Who do I make the cheque for {number} out to?",
            "Please put our tax number on the invoice of {number}.",
            "What does paying on account cost me?",
            "The payment for the {thing} hangs since {day}.",
        ],
        [
            "You took the sum for {number} from my account two times.",
            "Is it possible to buy the {thing} on credit?",
            "My credit card does not go through when I buy the {thing}.",
            "I need a receipt with tax for {number}.",
            "A fee was added to the {thing} on {day}. What is it for?",
            "The discount code is ignored when I pay for the {thing}.",
            "May I pay for {number} when it is delivered?",
            "My bank says that you charged me for {number} on {day}, which I never ordered.",
            "Can the invoice for {number} be made out to my company?",
            "Is there a fee if I pay for the {thing} by credit card?",
        ],
    ),
    "account": (
        [
            "I forgot my password on the {device}.",
            "How do I change the email address that my {device} logs in with?",
            "Your site says that I am locked out since {day}.",
            "Please delete my profile and all my data after {day}.",
            "I never get the code to sign in on my {device}.",
            "Somebody else has logged in as me on {day}.",
            "I have two logins since {day} and want to make them one.",
            "My surname changed on {day}, how do I enter the new one?",
            "The page for signing up does not load on my {device}.",
            "I cannot get into my account since {day}.",
            "How do I close my account?",
            "I want to use a different name when I sign in.",
            "The app on my {device} signs me out all the time.",
            "My profile shows an address that I never entered.",
            "Reset the login for my {device}, please.",
            "I did not ask for the new password that came on {day}.",
            "What is my user name?",
            "Please take me off your newsletter and remove my details.",
            "I would like to add a second address to my profile.",
            "The sign-up mail never came to my {device}.",
            "Since {day} my login is blocked.",
            "I do not see my old orders when I am signed in.",
            "Can two people share one login?",
            "I typed my password wrong five times on {day}.",
            "How can I see what you have stored about me?",
            "My {device} was stolen, please sign it out.",
            "I lost the phone that my login code goes to.",
            "My {device} asks for a password again and again.",
            "Which email address did I register with?",
            "The reset mail has not come since {day}.",
            "Please change the birthday in my profile.",
            "I want to leave your site for good, remove my data.",
            "My login works on one {device} but not on the other.",
            "Since {day} I am told that there is no such account.",
            "Another person's name stands in my profile.",
            "How do I turn off the second step when I log in?",
        ],
        [
            "I cannot sign in to see order {number}.",
            "The link to reset my login has expired on {day}.",
            "Can I have another username on my {device}?",
            "Please close my membership from {day} on.",
            "Your app logs me out whenever I look at the {thing}.",
            "Who changed the phone number in my profile on {day}?",
            "My {device} does not remember my password.",
            "I want all that you know about me erased by {day}.",
            "Since {day} your site says that my user does not exist.",
            "How can I change my name on your site with my {device}?",
        ],
    ),
    "stock": (
        [
            "When will the {thing} be available again?",
            "Do you have the {thing} in green?",
            "Is the {thing} sold out for good?",
            "How many of the {thing} are left?",
            "Will you sell the {thing} in larger sizes?",
            "The site shows no {thing} since {day}. Are there more to come?",
            "Can you put a {thing} aside for me?",
            "Does your shop in town carry the {thing}?",
            "I would like to be told when there are new boots.",
            "The {thing} cannot be ordered any more. Will it return?",
            "Keep one {thing} for me until {day}, please.",
            "Do you plan to get the {thing} in again?",
            "What sizes are there of the {thing}?",
            "Is there a {thing} left in your warehouse?",
            "I cannot find the {thing} on your site since {day}, is it gone?",
            "Does the {thing} come in other colours?",
            "Are there any {thing}s to be had?",
            "I only find the {thing} in red, is there blue?",
            "On {day} the {thing} was out of stock, and now?",
            "Write to me when the {thing} is back, please.",
            "Is the {thing} also made for children?",
            "Do you know when the next {thing}s come in?",
            "Which of your shops has the {thing} on the shelf?",
            "Has the {thing} been taken off the list?",
            "Could I order twenty of the {thing}?",
            "I saw a {thing} on your site on {day}, and it has vanished.",
            "Are you going to have the {thing} next week?",
            "The {thing} is marked as sold out.",
            "Is there more than one {thing} in the store?",
            "Will the {thing} be made again after {day}?",
            "Do you sell the {thing} in a set?",
            "I need five of the {thing}, are there enough?",
            "Have you stopped selling the {thing}?",
            "On {day} you had one {thing} left. Is it still there?",
            "May I look at a {thing} in one of your branches?",
            "Which models of the {thing} are there?",
        ],
        [
            "Have you run out of the {thing}?",
            "Are you getting more of the {thing} before {day}?",
            "Which colours of the {thing} do you offer?",
            "Could you reserve one {thing} until {day}?",
            "The {thing} has been unavailable since {day}, will it come back?",
            "Do you still make the {thing}?",
            "Is the {thing} gone from your range?",
            "How soon can one buy the {thing} again?",
            "I need two of the {thing}. Do you have that many?",
            "Can I see the {thing} in your shop in town?",
        ],
    ),
}


@dataclass(frozen=True)
class Message:
    message: str
    topic: str


def messages(split: str) -> list[Message]:
    """All messages of a split, "train" or "held_out", the same number of each topic, shuffled."""
    draw = random.Random(f"{SEED} {split}")
    found = []
    for topic, (to_train_on, held_out) in TEMPLATES.items():
        templates = to_train_on if split == "train" else held_out
        by_template = [list(_filled("{opening}" + template, split)) for template in templates]
        for texts in by_template:
            draw.shuffle(texts)
        # One of each sentence after the other, so that those with many things to fill in do not outnumber the others.
        texts = [text for texts in zip_longest(*by_template) for text in texts if text is not None]
        found += [Message(text, topic) for text in texts[: MESSAGES_PER_TOPIC[split]]]
    draw.shuffle(found)
    return found


def _filled(template: str, split: str) -> Iterable[str]:
    names = [name for name in SLOTS[split] if f"{{{name}}}" in template]
    for values in product(*(SLOTS[split][name] for name in names)):
        yield template.format(**dict(zip(names, values, strict=True)))


def write_messages(folder: Path) -> None:
    """Writes `train.jsonl` and `held_out.jsonl`, with the columns `id`, `message` and `topic`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in MESSAGES_PER_TOPIC:
        with atomic_write(folder / f"{split}.jsonl", over_input=True) as file:
            rows = ({"id": f"{split}-{n}", **asdict(message)} for n, message in enumerate(messages(split)))
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def read_messages(folder: Path, split: str) -> Iterator[dict[str, str]]:
    """The rows that `write_messages` wrote."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    write_messages(Path(sys.argv[1]))
