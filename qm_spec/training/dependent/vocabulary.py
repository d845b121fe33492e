"""Invented names, numbers and things, so many that none can be guessed."""

from __future__ import annotations

from random import Random


def _split(words: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(words.split(separator))


_ONSETS = _split("b br c ch d dr f fl g gl h j k kr l m n p pr qu r s sh st t th tr v w y z")
_VOWELS = _split("a e i o u ai au ea ee ie oa")
_CODAS = ("", "", "", "l", "n", "r", "s", "m", "nd", "rk", "st", "lt")
_TOWN_ENDS = _split("brook by field ford gate ham haven holm mere mouth ness ridge stead stow ton wick")
_MATERIALS = _split(
    "amber bone brass bronze cedar chalk clay copper coral cork flax fur glass gold horn iron ivory jade lace "
    "lead leather linen marble oak paper pearl pewter pine reed salt sand silk silver slate steel straw tin "
    "velvet wax willow wool"
)
_MAKERS = _split(
    "binder broker buyer carrier carver caster cleaner collector cutter dealer dyer engraver finder grinder "
    "gilder hauler keeper maker measurer mender merchant miller painter polisher presser porter seller shaper "
    "smith sorter spinner tester trader turner warden washer weaver weigher worker"
)
_SHADES = _split(
    "ashen bright burnt chalky cloudy cold dark deep dim dull dusty faded faint frosty glossy golden icy light "
    "milky misty muddy pale pearly rich rusty sandy shining silvery smoky soft stormy sunny tarnished warm"
)
_COLOURS = _split(
    "amber apricot azure black blue brown buff cherry cream crimson green grey indigo lemon lilac maroon mauve "
    "ochre olive orange pink plum purple red rose russet scarlet tan teal umber vermilion violet white yellow"
)
_QUALITIES = _split(
    "ancient angry blind bold brave busy calm careful clever crooked curious deaf eager fat gentle grey grim "
    "happy hungry idle jolly kind lame lazy little lonely lost merry mute nimble noble old patient plump polite "
    "proud quick quiet rude sad shy silent sleepy slow sly small stout strange tall tame thin tired weary wild "
    "wise young"
)
_CREATURES = _split(
    "abbot badger baker barber bear beggar bishop boatman boy bull captain cat clerk cook crow curate doctor dog "
    "donkey dove eagle farmer ferret fiddler fisher fox friar gardener ghost goat goose groom hare hawk hen heron "
    "hound hunter judge lawyer lion lord maid mason mayor miller mole monk mule nurse otter owl ox page pedlar pig "
    "pilot piper poet porter prince raven sailor sexton shepherd singer smith soldier squire stag stork swan tailor "
    "thief toad vicar widow wolf wren"
)
_SECRETS = _split(
    "code,key,lucky charm,magic spell,password,prize,riddle's answer,rule,seal,secret,secret sign,"
    "sign,ticket,token,treasure,true name,watchword",
    ",",
)


class Vocabulary:
    """Draws names and values; a name comes only once."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._names: set[str] = set()

    def _syllable(self) -> str:
        choice = self._rng.choice
        return choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS)

    def _once(self, name: str, again: str) -> str:
        """Return a name that did not come before: `name`, or with a word more where it did."""
        while name in self._names:
            name = f"{name} {again}"
        self._names.add(name)
        return name

    def word(self) -> str:
        """Return an invented word, such as `Trolvansea`."""
        return "".join(self._syllable() for _ in range(self._rng.choice((2, 2, 3)))).capitalize()

    def number(self) -> str:
        """Return a number of 4 to 6 digits."""
        return str(self._rng.randrange(1000, 10 ** self._rng.choice((4, 5, 6))))

    def value(self) -> str:
        """Return a number, or one or two invented words."""
        form = self._rng.random()
        return self.number() if form < 0.4 else self.word() if form < 0.6 else f"{self.word()} {self.word()}"

    def town(self) -> str:
        """Return a town, such as `Brailwick`."""
        return self._syllable().capitalize() + self._syllable() + self._rng.choice(_TOWN_ENDS)

    def trade(self) -> str:
        """Return a trade, such as `copper engraver`."""
        return f"{self._rng.choice(_MATERIALS)} {self._rng.choice(_MAKERS)}"

    def colour(self) -> str:
        """Return a colour, such as `pale ochre`."""
        return f"{self._rng.choice(_SHADES)} {self._rng.choice(_COLOURS)}"

    def person(self) -> str:
        """Return a new person's name, such as `Keldra Moustin`."""
        return self._once(f"{self.word()} {self.word()}", self.word())

    def creature(self) -> str:
        """Return a new creature, such as `grey fox`."""
        choice = self._rng.choice
        return self._once(f"{choice(_QUALITIES)} {choice(_CREATURES)}", f"of {self.town()}")

    def secret(self) -> str:
        """Return what a creature may own, such as `secret number`."""
        return self._rng.choice(_SECRETS)

    def variable(self) -> str:
        """Return a new name of a variable, such as `KE27`."""
        return self._once(self._syllable().upper() + str(self._rng.randrange(10, 1000)), self._syllable().upper())

    def list_name(self) -> str:
        """Return a new name of a list, such as `Q417`."""
        return self._once(
            self._rng.choice("ABCDEFGHKLMNPQRSTVWXZ") + str(self._rng.randrange(100, 1000)), self.number()
        )
