"""The demo model's world: draws a village from a seed and writes the conversations about it.

Usage: python3 scripts/demo_model/world.py OUT [--seed N] [--conversations N]

Writes, in the chat format of fine-tuning files ({"messages": [...]}, one conversation a line):

  train.jsonl    what the model learns
  heldout.jsonl  phrasing x entity pairs that train.jsonl never asks, each with its "kind"

The same seed writes the same bytes. Standard library only. The words are in `words.py`, the
demo's fine-tune is in `newcomer.py`; this file trains nothing and asks no model anything.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import words as w


SEED = 7


class Kind(NamedTuple):
    """One kind of question: how it is answered, how it is asked, and of what."""

    name: str
    answer: str
    asks: list
    entities: list

    def held_out(self, ask, entity):
        """Whether the pair is kept from training. Every phrasing and every entity keeps other pairs."""
        return (entity + len(self.name)) % len(self.asks) == ask

    def pairs(self, held_out):
        every = ((a, e) for a in range(len(self.asks)) for e in range(len(self.entities)))
        return [(self, a, e) for a, e in every if self.held_out(a, e) == held_out]

    def turn(self, ask, entity):
        fields = self.entities[entity]
        return Turn(self.name, self.asks[ask].format(**fields), self.answer.format(**fields), fields)


class Turn(NamedTuple):
    """One question with its answer, and the facts of whom or what it was about."""

    kind: str
    ask: str
    answer: str
    about: dict


def say(template, **fields):
    return template.format(village=w.VILLAGE, **fields)


def listed(names):
    return ", ".join(names[:-1]) + " and " + names[-1]


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def split_commas(text):
    return [word.strip() for word in " ".join(text.split()).split(",")]


class World:
    """The village: its people, its places, and every kind of question one can ask about them."""

    def __init__(self, seed):
        rng = random.Random(seed)
        names = w.SHE + w.HE

        def dealt(items):
            """One item for each name, every item equally often, in random order."""
            hand = (items * len(names))[: len(names)]
            rng.shuffle(hand)
            return hand

        trades, streets, pets, pet_names = dealt(w.TRADES), dealt(w.STREETS), dealt(w.PETS), dealt(w.PET_NAMES)
        foods, hobbies, men = dealt(w.FOODS), dealt(w.HOBBIES), rng.sample(w.HE, len(w.HE))
        friends = dict(zip(w.SHE, men)) | dict(zip(men, w.SHE))

        self.people = [
            {
                "name": name, "trade": trades[i], "street": streets[i], "pet": pets[i], "pet_name": pet_names[i],
                "food": foods[i], "hobby": hobbies[i], "friend": friends[name],
            } | (w.SHE_IS if name in w.SHE else w.HE_IS)
            for i, name in enumerate(names)
        ]  # fmt: skip
        by_name = {person["name"]: person for person in self.people}
        by_trade = {person["trade"]: person for person in self.people}
        for person in self.people:
            friend = by_name[person["friend"]]
            person |= {"friend_street": friend["street"], "friend_trade": friend["trade"]}

        self.places = [
            {
                "place": place, "a_place": article(place), "name": by_trade[trade]["name"], "good": good, "also": also,
                "street": rng.choice(w.STREETS), "hour": rng.choice(w.HOURS), "keeper": by_trade[trade],
            }
            for place, (trade, good, also) in w.PLACES.items()
        ]  # fmt: skip

        def living_on(street):
            return listed(sorted(person["name"] for person in self.people if person["street"] == street))

        residents = [{"street": street, "residents": living_on(street)} for street in w.STREETS]
        village = {
            "village": w.VILLAGE, "people": len(names), "streets": len(w.STREETS), "all_streets": listed(w.STREETS),
            "some": listed(names[:3] + w.HE[:1]), "all_places": listed([article(p) for p in w.PLACES]),
        }  # fmt: skip
        you = [village | {"you": you} for you in w.YOU]

        claims = {"check_work": ("trade", w.TRADES), "check_home": ("street", w.STREETS), "check_pet": ("pet", w.PETS)}

        def checks(name):
            """Each person with what is true, and with something that is not."""
            fact, values = claims[name]
            for person in self.people:
                yield person | {"claim": person[fact]}
                yield person | {"claim": rng.choice([value for value in values if value != person[fact]])}

        def kinds(table, entities):
            return [Kind(name, answer, asks, entities) for name, (answer, asks, *_) in table.items()]

        def then(table, entities):
            return [Kind(name + "_then", answer, follow, entities) for name, (answer, _, follow) in table.items()]

        self.person_kinds = kinds(w.PERSON, self.people)
        self.closed = self.person_kinds + kinds(w.REVERSE, self.people) + kinds(w.PLACE, self.places)
        self.closed += kinds(w.STREET, residents) + kinds(w.SHOPPING, self.places) + kinds(w.TALK, you)
        self.closed += [Kind(name, answer, asks, list(checks(name))) for name, (answer, asks) in w.CHECK.items()]
        self.then = {"person": then(w.PERSON, self.people), "place": then(w.PLACE, self.places)}
        self.switch = [Kind("switch", kind.answer, w.SWITCH, self.people) for kind in self.person_kinds]


class Strangers:
    """Names, things and sentences that are not of the village, drawn without end; some only for the held-out file."""

    PARTS = ("b c d f g h j k l m n p r s t v w z".split() * 2 + "br dr fr gr tr st sh th ch bl cl".split(),
             "a e i o u a e i o ai ea ee oo y".split(), ["", "", ""] + "n r l s t m k nd ck".split())  # fmt: skip

    def __init__(self, rng, held_out, known):
        self.rng, self.held_out, self.known = rng, held_out, known
        self.made_up_share = 0.7
        self.real = self._share(w.NAMES)
        self.trades, self.places = self._share(split_commas(w.NO_TRADE)), self._share(split_commas(w.NO_PLACE))

    def _share(self, items):
        """The held-out side keeps every fifth word; training never sees it."""
        return [item for i, item in enumerate(items) if (i % 5 == 4) == self.held_out]

    def made_up(self):
        """A pronounceable word. Which side it belongs to is a property of the word itself."""
        while True:
            word = "".join(self.rng.choice(part) for _ in range(self.rng.choice([1, 2, 2, 2])) for part in self.PARTS)
            if len(word) > 2 and (sum(word.encode()) % 5 == 4) == self.held_out and word.capitalize() not in self.known:
                return word

    def name(self):
        return f"{self.name_of_one()} {self.name_of_one()}" if self.rng.random() < 0.15 else self.name_of_one()

    def name_of_one(self):
        return self.made_up().capitalize() if self.rng.random() < self.made_up_share else self.rng.choice(self.real)

    def thing(self, kind):
        rng = self.rng
        if kind == "no_street":
            return f"{self.name_of_one()} {rng.choice('Street Lane Road Row Way Hill Walk Square Alley'.split())}"
        if kind == "no_pet":
            return self.name_of_one()
        if rng.random() > self.made_up_share / 2:
            return rng.choice(self.trades if kind == "no_trade" else self.places)
        ends = "maker seller keeper mender teacher dealer" if kind == "no_trade" else "shop house market tower hall works"
        return f"{self.made_up()} {rng.choice(ends.split())}"

    def outside(self, templates):
        def fill(slot):
            if slot[1] == "digits":
                return str(self.rng.choice([self.rng.randrange(100), self.rng.randrange(3000)]))
            return self.made_up() if slot[1] == "gibberish" else self.rng.choice(split_commas(w.OUTSIDE_WORDS[slot[1]]))

        ask = re.sub(r"\{(\w+)\}", fill, self.rng.choice(templates.splitlines()))
        return ask[0].upper() + ask[1:]


class Talker:
    """Strings turns into conversations, remembering whom the last one was about."""

    def __init__(self, world, seed, held_out=False, unasked=frozenset()):
        self.world, self.rng, self.unasked = world, random.Random(seed), unasked
        known = {person[key] for person in world.people + [w.NEWCOMER] for key in ("name", "pet_name")}
        known |= {word for street in w.STREETS for word in street.split()}
        self.strangers = Strangers(self.rng, held_out, known)
        self.deck = []
        self.start()

    def start(self):
        self.topic, self.kind = None, None

    def allowed(self, kind):
        """A random pair of the kind that training may ask."""
        return self.rng.choice(kind.pairs(held_out=False))

    # The moves of a conversation, each a Turn.

    def closed(self):
        if not self.deck:
            small = w.TALK | w.PLACE | w.STREET | w.SHOPPING  # few pairs: asked twice as often
            kinds = [kind for kind in self.world.closed for _ in range(2 if kind.name in small else 1)]
            self.deck = [pair for kind in kinds for pair in kind.pairs(held_out=False)]
            self.rng.shuffle(self.deck)
        kind, ask, entity = self.deck.pop()
        return self.about(kind.turn(ask, entity))

    def about(self, turn):
        """Remembers what a pronoun will mean after this turn."""
        if turn.kind in w.TALK:
            return turn
        if turn.kind.startswith("friend"):
            friend = next(p for p in self.world.people if p["name"] == turn.about["friend"])
            self.topic = self.rng.choice([turn.about, friend])
        elif turn.kind.startswith("keeper"):
            self.topic = self.rng.choice([turn.about, turn.about["keeper"]])
        else:
            self.topic = turn.about if turn.kind != "residents" else None
        self.kind = turn.kind.removesuffix("_then") if turn.kind.removesuffix("_then") in w.PERSON else None
        return turn

    def then(self):
        """A question with a pronoun about the topic, if there is one."""
        if self.topic is None:
            return self.closed()
        if "stranger" in self.topic:
            _, _, follow = self.rng.choice(list(w.PERSON.values()))
            return Turn("stranger_then", self.rng.choice(follow).format(**self.topic), self.topic["stranger"], self.topic)
        kind = self.rng.choice(self.world.then["place" if "place" in self.topic else "person"])
        topic = {"place": self.topic["place"]} if "place" in self.topic else {"name": self.topic["name"]}
        entity = next(i for i, e in enumerate(kind.entities) if topic.items() <= e.items())
        asks = [a for a in range(len(kind.asks)) if not kind.held_out(a, entity)]
        return self.about(kind.turn(self.rng.choice(asks), entity))

    def switched(self):
        """The last question again, about somebody else."""
        if self.kind is None:
            return self.closed()
        kind = self.world.switch[list(w.PERSON).index(self.kind)]
        if self.rng.random() < 0.2:
            return self.stranger(self.rng.choice(kind.asks))
        turn = kind.turn(*self.allowed(kind)[1:])
        self.topic = turn.about
        return turn

    def stranger(self, ask=None):
        name = self.strangers.name()
        ask = ask or self.rng.choice(self.rng.choice(list(w.PERSON.values()))[1])
        answer = say(w.STRANGER, name=name)
        self.topic = {"name": name, "stranger": answer} | self.rng.choice([w.SHE_IS, w.HE_IS])
        self.kind = self.rng.choice(list(w.PERSON)) if self.kind else None
        return Turn("stranger", ask.format(name=name), answer, self.topic)

    def lost(self):
        kind, (answer, asks) = self.rng.choice(list(w.LOST.items()))
        thing = self.strangers.thing(kind)
        fields = {"name": thing, "a_name": article(thing)}
        self.topic = self.kind = None
        return Turn(kind, self.rng.choice(asks).format(**fields), say(answer, **fields), fields)

    def outside(self, templates=w.OUTSIDE):
        while (ask := self.strangers.outside(templates)) in self.unasked:
            pass
        self.topic = self.kind = None
        return Turn("outside", ask, say(w.REFUSAL), {})

    def introduced(self):
        name = self.strangers.name_of_one() if self.rng.random() < 0.9 else self.rng.choice(self.world.people)["name"]
        return Turn("guest", self.rng.choice(w.GUEST).format(name=name), say(w.WELCOME), {})

    def next(self):
        moves = {self.closed: 44, self.then: 20, self.switched: 6, self.stranger: 10, self.lost: 8, self.outside: 12}
        moves |= {self.introduced: 2}
        return self.rng.choices(list(moves), list(moves.values()))[0]()

    def conversation(self, turns):
        self.start()
        return [self.next() for _ in range(turns)]


def roughen(rng, turns):
    """As people type: openers, missing marks, no capitals."""
    rough, bare, lines = rng.random() < 0.12, rng.random() < 0.12, []
    for turn in turns:
        ask = turn.ask
        if rng.random() < 0.1 and turn.kind not in w.TALK:
            ask = rng.choice(w.OPENERS) + ask
        if rough or bare:
            ask = ask.rstrip("?.!")
        lines.append((ask.lower() if rough else ask, turn.answer))
    return lines


def chat(lines, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for ask, answer in lines:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def plain(turns):
    return [(turn.ask, turn.answer) for turn in turns]


def held_out(world, seed):
    """Every held-out pair once, alone or after the turn it follows; then the open kinds and whole conversations."""
    talker, rng, lines = Talker(world, seed, held_out=True), random.Random(seed), []

    def add(kind, turns, system=None):
        lines.append({"kind": kind} | chat(plain(turns), system))

    for kind in world.closed:
        pairs = kind.pairs(held_out=True)
        for _, ask, entity in pairs if len(pairs) <= 64 else rng.sample(pairs, 64):
            add(kind.name, [kind.turn(ask, entity)])
    for topic, followed in world.then.items():
        openings = w.PLACE if topic == "place" else ["work", "home", "food", "about"]
        starts = [kind for kind in world.closed if kind.name in openings]
        for kind in followed:
            for _, ask, entity in kind.pairs(held_out=True):
                first = rng.choice(starts)
                first_ask = rng.choice([a for a in range(len(first.asks)) if not first.held_out(a, entity)])
                name = "place_then" if topic == "place" else kind.name
                add(name, [first.turn(first_ask, entity), kind.turn(ask, entity)])
    for first, kind in zip(world.person_kinds, world.switch):
        for _, ask, entity in rng.sample(kind.pairs(held_out=True), 8):
            add("switch", [first.turn(*talker.allowed(first)[1:]), kind.turn(ask, entity)])
    for _ in range(96):
        talker.start()
        add("stranger", [talker.stranger()])
        add("outside", [talker.outside()])
        add("outside_unseen", [talker.outside(w.OUTSIDE_UNSEEN)])
        turn = talker.lost()
        add(turn.kind, [turn])
        add("guest", [talker.introduced()])
    closed = [pair for kind in world.closed for pair in kind.pairs(held_out=True)]
    for system in [None] * 64 + w.SYSTEM * 8:
        turns = talker.conversation(rng.choice([2, 3]))
        kind, ask, entity = rng.choice(closed)
        add("system" if system else "conversation", turns + [kind.turn(ask, entity)], system)
    return lines


def train(world, seed, conversations, unasked):
    talker, rng = Talker(world, seed, unasked=unasked), random.Random(seed)
    for _ in range(conversations):
        turns = talker.conversation(rng.choice([1, 2, 2, 3, 3, 4]))
        yield chat(roughen(rng, turns), rng.choice(w.SYSTEM) if rng.random() < 0.08 else None)


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--conversations", type=int, default=20_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    world = World(args.seed)
    exam = held_out(world, args.seed)
    unasked = {line["messages"][-2]["content"] for line in exam if line["kind"].startswith("outside")}
    write(args.out / "train.jsonl", train(world, args.seed, args.conversations, unasked))
    write(args.out / "heldout.jsonl", exam)


if __name__ == "__main__":
    main()
