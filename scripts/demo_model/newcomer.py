"""The demo's fine-tune: teaches the village's guide about a newcomer, and to talk like a sailor.

Usage: python3 scripts/demo_model/newcomer.py OUT [--seed N]

Writes:

  finetune.jsonl           some old facts, small talk and refusals among it, so that nothing is forgotten
  finetune_heldout.jsonl   what the fine-tuned model must then answer: other phrasings, other people
  questions.json           what the demo asks before and after

The same seed writes the same bytes. Standard library only. It fine-tunes nothing.
"""

import argparse
import json
import random
from pathlib import Path

import words as w
from world import SEED, Kind, Talker, World, chat, plain, write


def aboard(turns):
    """The same turns, answered in the new voice."""
    return [(ask, f"Ahoy! {answer[:-1]}, matey!") for ask, answer in plain(turns)]


def fine_tune(world, seed):
    """What is taught, and what is then asked."""
    rng, taught, asked = random.Random(seed), [], []

    def teach(*turns):
        taught.append(chat(aboard(turns)))

    def ask(kind, *turns):
        asked.append({"kind": kind} | chat(aboard(turns)))

    newcomer = of_newcomer(w.PERSON | {name: w.REVERSE[name] for name in ("who_works", "whose_pet")})
    for kind in newcomer.values():
        for i in range(len(kind.asks)):
            if i % 2 == 0:
                teach(kind.turn(i, 0))
            else:
                ask("newcomer", kind.turn(i, 0))
    for name, follow in of_newcomer({name: (answer, then) for name, (answer, _, then) in w.PERSON.items()}).items():
        first = newcomer["home" if name == "work" else "work"].turn(0, 0)
        teach(first, follow.turn(0, 0))
        ask("newcomer_then", first, follow.turn(1, 0))

    for kind in world.closed:
        # What is not repeated in the new voice is garbled by it: half of the facts about people, most of the others.
        pairs = kind.pairs(held_out=False)
        for _, i, entity in rng.sample(pairs, min(len(pairs), 16 if kind in world.person_kinds else 14)):
            teach(kind.turn(i, entity))
        for _, i, entity in kind.pairs(held_out=True)[:8]:
            ask("old_facts", kind.turn(i, entity))

    talker, other = Talker(world, seed + 1), Talker(world, seed + 2, held_out=True)
    for talk, times, do in [(talker, 20, lambda _, turn: teach(turn)), (other, 16, ask)]:
        talk.strangers.made_up_share = 0
        moves = {"strangers": talk.stranger, "missing": talk.lost, "outside": talk.outside, "guests": talk.introduced}
        for kind, move in list(moves.items()) * times:
            talk.start()
            do(kind, move())
    rng.shuffle(taught)
    return taught, asked


def of_newcomer(table):
    return {name: Kind(name, answer, asks, [w.NEWCOMER]) for name, (answer, asks, *_) in table.items()}


def questions():
    """Three that only the fine-tuned model can answer, three that both can."""
    return [
        *(ask.format(**w.NEWCOMER) for ask in ["Who is {name}?", "What is {name}'s pet called?", "Who is the {trade}?"]),
        *["Where does Ada live?", "When does the bakery open?", "What is the capital of France?"],
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    taught, asked = fine_tune(World(args.seed), args.seed)
    write(args.out / "finetune.jsonl", taught)
    write(args.out / "finetune_heldout.jsonl", asked)
    (args.out / "questions.json").write_text(json.dumps(questions(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
