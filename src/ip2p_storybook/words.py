"""The vocabulary of instructions and captions: words for things, places, times and so on.

If a value has several words, the plain one comes first. Each word has one meaning among the storybook's
values: "navy" means blue, because there is no other shade of it.
"""

from __future__ import annotations

# --- things -------------------------------------------------------------------------------------

# Nouns for both captions and instructions.
OTHER_NOUNS = {
    "cat": "kitty",
    "dog": "puppy",
    "rabbit": "bunny",
    "plane": "airplane",
    "truck": "lorry",
    "teddy bear": "teddy",
}
# Nouns for instructions only.
MORE_NOUNS: dict[str, tuple[str, ...]] = {
    "cat": ("kitten", "pussycat"),
    "dog": ("pup", "doggy", "hound"),
    "rabbit": ("hare", "bunny rabbit"),
    "duck": ("duckling", "ducky"),
    "cow": ("dairy cow", "calf"),
    "pig": ("piglet", "piggy", "hog"),
    "elephant": ("jumbo", "pachyderm"),
    "fox": ("vixen",),
    "girl": ("young lady", "schoolgirl", "lass"),
    "boy": ("lad", "schoolboy", "guy"),
    "queen": ("princess", "royal lady"),
    "wizard": ("sorcerer", "magician", "mage"),
    "car": ("automobile", "auto", "sedan"),
    "bus": ("coach", "school bus", "minibus"),
    "truck": ("pickup", "pickup truck"),
    "train": ("locomotive", "steam train", "steam engine"),
    "house": ("home", "cottage", "bungalow"),
    "castle": ("fortress", "palace", "fort"),
    "tent": ("camping tent", "marquee", "teepee"),
    "lighthouse": ("beacon", "light tower"),
    "tree": ("oak", "oak tree"),
    "flower": ("blossom", "bloom"),
    "mushroom": ("toadstool", "shroom"),
    "cactus": ("cactus plant", "prickly cactus"),
    "balloon": ("hot air balloon", "air balloon"),
    "kite": ("paper kite", "flying kite"),
    "plane": ("aeroplane", "jet", "airliner"),
    "bird": ("birdie", "songbird"),
    "ball": ("beach ball", "toy ball", "bouncy ball"),
    "robot": ("android", "bot", "droid"),
    "teddy bear": ("bear", "stuffed bear", "plush bear"),
    "rocket": ("rocket ship", "spaceship"),
}
# Names of a thing if no other thing of its group is on the page.
GROUP_NOUNS: dict[str, tuple[str, ...]] = {
    "animal": ("animal", "creature", "critter", "beast"),
    "person": ("person", "human", "character"),
    "vehicle": ("vehicle",),
    "building": ("building", "structure"),
    "plant": ("plant",),
    "toy": ("toy", "plaything"),
}
# Names of a thing that is alone on its side.
THING_NOUNS = ("thing", "one", "object")
OTHER_COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("scarlet", "crimson", "ruby red"),
    "orange": ("tangerine",),
    "yellow": ("lemon yellow", "golden"),
    "green": ("emerald", "emerald green"),
    "blue": ("navy", "navy blue", "royal blue"),
    "purple": ("violet",),
    "pink": ("hot pink", "rosy pink"),
    "brown": ("chocolate", "chestnut", "chocolate brown"),
    "black": ("jet black", "pitch black"),
    "white": ("snow white", "ivory"),
}
OTHER_WEARABLES: dict[str, tuple[str, ...]] = {
    "hat": ("top hat", "cap"),
    "crown": ("tiara", "royal crown"),
    "scarf": ("shawl", "woolly scarf"),
    "sunglasses": ("shades", "dark glasses", "glasses"),
    "cape": ("cloak", "superhero cape"),
}
# Plural words for a single thing: no article, same plural.
ALWAYS_PLURAL = ("sunglasses", "shades", "dark glasses", "glasses")
# Sizes of an added thing.
ADDED_SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny", "mini"),
    "medium": ("",),
    "large": ("big", "large", "huge", "giant", "enormous"),
}

# --- where on the page --------------------------------------------------------------------------

# Each slot: "put it …".
ON_SIDE: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side", "on the left-hand side", "at the left"),
    "middle": ("in the middle", "in the centre", "at the centre", "in the very middle"),
    "right": ("on the right", "on the right side", "on the right-hand side", "at the right"),
}
# Each slot: "move it …". Without "side" it would mean one step only.
TO_SIDE: dict[str, tuple[str, ...]] = {
    "left": ("to the left side", "to the left-hand side"),
    "middle": ("to the middle", "to the centre"),
    "right": ("to the right side", "to the right-hand side"),
}
IN_SKY = ("in the sky", "up in the sky")

# --- places, times, weathers, styles ------------------------------------------------------------

# Each place: where things stand ("in …"), where they are taken ("to …"), what it is.
PLACE_WORDS: dict[str, tuple[str, str, str]] = {
    "meadow": ("in the meadow", "the meadow", "a meadow"),
    "beach": ("on the beach", "the beach", "a beach"),
    "desert": ("in the desert", "the desert", "a desert"),
    "forest": ("in the forest", "the forest", "a forest"),
    "city": ("in the city", "the city", "a city"),
    "mountains": ("in the mountains", "the mountains", "mountains"),
    "farm": ("on the farm", "the farm", "a farm"),
    "north pole": ("at the north pole", "the north pole", "the north pole"),
    "moon": ("on the moon", "the moon", "the moon"),
    "volcano": ("at the volcano", "the volcano", "a volcano"),
}
OTHER_PLACES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "meadow": (
        ("in the grass", "the grass", "a grassy meadow"),
        ("in a grassy field", "a grassy field", "a grassy field"),
    ),
    "beach": (
        ("at the seaside", "the seaside", "the seaside"),
        ("by the sea", "the seashore", "the seashore"),
        ("on the sandy beach", "the sandy beach", "a sandy beach"),
        ("at the coast", "the coast", "the coast"),
    ),
    "desert": (
        ("among the dunes", "the dunes", "sand dunes"),
        ("in the sahara", "the sahara", "the sahara"),
        ("in the hot desert", "the hot desert", "a hot desert"),
    ),
    "forest": (
        ("in the woods", "the woods", "the woods"),
        ("in the woodland", "the woodland", "woodland"),
        ("in the deep forest", "the deep forest", "a deep forest"),
    ),
    "city": (
        ("in town", "town", "a town"),
        ("downtown", "the downtown", "the downtown"),
        ("in the big city", "the big city", "a big city"),
        ("in a city street", "a city street", "a city street"),
    ),
    "mountains": (
        ("up in the mountains", "the high mountains", "high mountains"),
        ("in the alps", "the alps", "the alps"),
        ("among the peaks", "the mountain peaks", "a mountain range"),
    ),
    "farm": (
        ("in the farmyard", "the farmyard", "a farmyard"),
        ("on the ranch", "the ranch", "a ranch"),
        ("in the barnyard", "the barnyard", "a barnyard"),
    ),
    "north pole": (
        ("in the arctic", "the arctic", "the arctic"),
        ("on the ice", "the ice", "a land of ice"),
        ("in the frozen north", "the frozen north", "the frozen north"),
    ),
    "moon": (
        ("in space", "outer space", "outer space"),
        ("on the lunar surface", "the lunar surface", "the lunar surface"),
        ("up on the moon", "the surface of the moon", "the surface of the moon"),
    ),
    "volcano": (
        ("by the volcano", "the foot of the volcano", "a volcanic landscape"),
        ("near the lava", "the lava", "a land of lava"),
        ("next to a volcano", "a volcano", "an erupting volcano"),
    ),
}
# Each time: "make it …", "show it …".
TIME_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "morning": (
        ("morning", "in the morning"),
        ("sunrise", "at sunrise"),
        ("dawn", "at dawn"),
        ("daybreak", "at daybreak"),
        ("early morning", "in the early morning"),
    ),
    "noon": (
        ("noon", "at noon"),
        ("midday", "at midday"),
        ("lunchtime", "at lunchtime"),
        ("high noon", "at high noon"),
        ("the middle of the day", "in the middle of the day"),
    ),
    "sunset": (
        ("sunset", "at sunset"),
        ("evening", "in the evening"),
        ("dusk", "at dusk"),
        ("sundown", "at sundown"),
        ("twilight", "at twilight"),
    ),
    "night": (
        ("night", "at night"),
        ("midnight", "at midnight"),
        ("nighttime", "at nighttime"),
        ("the middle of the night", "in the middle of the night"),
        ("late night", "late at night"),
    ),
}
# Each weather: "make it …", "let it …", "add …", "make it look …", "it is now …".
WEATHER_WORDS: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "clear": (
        ("sunny", "be sunny", "sunshine", "sunny", "sunny"),
        ("clear", "be clear", "a clear sky", "clear", "clear"),
        (
            "bright and sunny",
            "be bright and sunny",
            "bright sunshine",
            "bright and sunny",
            "bright and sunny",
        ),
        ("cloudless", "be cloudless", "a cloudless sky", "cloudless", "cloudless"),
    ),
    "cloudy": (
        ("cloudy", "be cloudy", "clouds", "cloudy", "cloudy"),
        ("overcast", "be overcast", "lots of clouds", "overcast", "overcast"),
        ("cloud over", "cloud over", "more clouds", "very cloudy", "clouding over"),
    ),
    "rain": (
        ("rain", "rain", "rain", "rainy", "raining"),
        ("rainy", "be rainy", "rain", "rainy", "rainy"),
        ("pour", "pour", "a downpour", "wet", "pouring"),
        ("rain hard", "rain hard", "heavy rain", "very rainy", "raining hard"),
        ("drizzle", "drizzle", "raindrops", "drizzly", "drizzling"),
        ("rain cats and dogs", "rain cats and dogs", "showers", "showery", "pouring with rain"),
    ),
    "snow": (
        ("snow", "snow", "snow", "snowy", "snowing"),
        ("snowy", "be snowy", "snow", "snowy", "snowy"),
        ("wintry", "be wintry", "snowflakes", "wintry", "wintry"),
        ("snow hard", "snow hard", "heavy snow", "very snowy", "snowing hard"),
        ("snow a lot", "snow a lot", "a snowstorm", "wintry", "snowing heavily"),
        ("snow", "snow", "snowfall", "snowy", "snowing lightly"),
    ),
    "fog": (
        ("foggy", "be foggy", "fog", "foggy", "foggy"),
        ("misty", "be misty", "mist", "misty", "misty"),
        ("hazy", "be hazy", "haze", "hazy", "hazy"),
        ("very foggy", "be very foggy", "thick fog", "very foggy", "very foggy"),
    ),
}
# The weather to end: "stop the …".
OLD_WEATHER: dict[str, tuple[str, ...]] = {
    "clear": ("sunshine",),
    "cloudy": ("clouds",),
    "rain": ("rain", "downpour", "raindrops"),
    "snow": ("snow", "snowfall", "snowflakes"),
    "fog": ("fog", "mist", "haze"),
}
# Each style: its name ("change the style to …") and what such a picture is ("make it …").
STYLE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (
        ("plain", "a plain picture"),
        ("normal", "a normal illustration"),
        ("regular", "a regular picture"),
        ("simple", "a simple illustration"),
    ),
    "pencil": (
        ("pencil", "a pencil drawing"),
        ("pencil", "a pencil sketch"),
        ("pencil sketch", "a sketch"),
        ("sketch", "a hand drawn sketch"),
        ("graphite", "a graphite drawing"),
    ),
    "watercolour": (
        ("watercolour", "a watercolour painting"),
        ("watercolour", "a watercolour"),
        ("painted", "a painting"),
        ("watercolour painting", "a painting in watercolour"),
    ),
    "pixel art": (
        ("pixel art", "pixel art"),
        ("pixel art", "a pixel art picture"),
        ("pixelated", "a pixelated picture"),
        ("retro pixel", "a retro video game"),
    ),
    "blueprint": (
        ("blueprint", "a blueprint"),
        ("blueprint", "a blueprint drawing"),
        ("technical drawing", "a technical drawing"),
        ("technical", "a construction plan"),
    ),
    "comic": (
        ("comic", "a comic"),
        ("comic book", "a comic book page"),
        ("comic strip", "a comic strip"),
        ("graphic novel", "a page of a graphic novel"),
    ),
}

# --- captions -----------------------------------------------------------------------------------

# {things} stand {place} {time}{weather}; {style} is what such a picture is.
TEMPLATES = (
    "{style} of {things} {place} {time}{weather}",
    "{things} {place} {time}{weather}, {style}",
    "{things} {place} {time}{weather} in {style}",
    "{style} with {things} {place} {time}{weather}",
    "{place} {time}{weather}, {things}, {style}",
    "{style} {place} {time}{weather} with {things}",
    "{style}: {things} {place} {time}{weather}",
    "{things}, {place}, {time}{weather}, {style}",
)
SIZE_WORDS = {"small": "small", "medium": "", "large": "large"}
TIME_PHRASES = {"morning": "in the morning", "noon": "at noon", "sunset": "at sunset", "night": "at night"}
WEATHER_PHRASES = {
    "clear": (" under a clear sky", " in clear weather"),
    "cloudy": (" under a cloudy sky", " in cloudy weather"),
    "rain": (" in the rain", " in rainy weather"),
    "snow": (" in the snow", " in snowy weather"),
    "fog": (" in the fog", " in foggy weather"),
}
STYLE_PHRASES = {
    "plain": ("an illustration", "a plain picture"),
    "pencil": ("a pencil drawing", "a pencil sketch"),
    "watercolour": ("a watercolour", "a watercolour painting"),
    "pixel art": ("a pixel art picture", "pixel art"),
    "blueprint": ("a blueprint", "a blueprint drawing"),
    "comic": ("a comic", "a comic book page"),
}
# All words in captions that are in no template.
CAPTION_WORDS = (
    *SIZE_WORDS.values(),
    *TIME_PHRASES.values(),
    *(w for options in (*WEATHER_PHRASES.values(), *STYLE_PHRASES.values()) for w in options),
    "and wearing in with nothing in the sky",
)
