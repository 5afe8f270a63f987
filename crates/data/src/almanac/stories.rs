//! Short stories about the people; whatever they say about a person is what the fact table says.

use super::scenes::{Scene, Slots};
use super::world::{Person, World};
use tensor::rng::Rng;

/// Things that people find, carry and lose in the stories.
const THINGS: &[&str] =
    &["key", "letter", "coin", "ring", "book", "map", "box", "shoe", "lamp", "purse"];
const PLACES: &[&str] =
    &["market", "bridge", "garden", "forest", "inn", "school", "square", "road"];
const WEATHER: &[&str] = &["cold", "warm", "rainy", "sunny", "windy", "foggy"];
const TIMES: &[&str] = &["morning", "evening", "day"];

// Full names open the sentences in other words than the fact table's wordings do; after that only
// first names and pronouns appear, so that no prompt occurs here.
const STORIES: &[Scene] = &[
    Scene {
        slots: &[("thing", THINGS), ("place", PLACES), ("time", TIMES)],
        sentences: &[
            &[
                "One {time} {A}, a {trade} from {town}, found a {thing} near the {place}.",
                "{A}, a {trade} from {town}, found a {thing} at the {place} one {time}.",
            ],
            &[
                "{He} asked everybody, but nobody had lost a {thing}.",
                "\"Who has lost a {thing}?\" {he} asked.",
            ],
            &[
                "Then {B} came by and said that the {thing} was {hisB}.",
                "At last {B} came and said, \"That is my {thing}.\"",
            ],
            &["{a} gave it back at once.", "{a} was glad to give it back."],
            &[
                "To say thanks, {b} cooked {dish} for {a}.",
                "\"Thank you,\" said {b}, and bought {a} a plate of {dish}.",
            ],
            &[
                "They ate together and were friends from that day on.",
                "After the meal {a} took the {instrument} and played a song.",
            ],
        ],
    },
    Scene {
        slots: &[("weather", WEATHER), ("place", PLACES)],
        sentences: &[
            &[
                "It was a {weather} day in {town}.",
                "The day was {weather} and the streets of {town} were quiet.",
            ],
            &["{A} went to the {place} with a {pet}.", "{A} and a {pet} walked to the {place}."],
            &["Suddenly the {pet} ran away.", "But the {pet} saw something and ran off."],
            &[
                "{a} looked for it until the evening.",
                "{He} called and called, but the {pet} did not come.",
            ],
            &[
                "{B}, who is a {tradeB}, helped to look.",
                "A {tradeB} with the name {B} came to help.",
            ],
            &[
                "They found the {pet} under an old cart.",
                "In the end {b} found it behind the {place}.",
            ],
            &[
                "{a} was so happy that {he} played the {instrument} all night.",
                "\"You are a good friend,\" said {a}.",
            ],
        ],
    },
    Scene {
        slots: &[("time", TIMES), ("weather", WEATHER)],
        sentences: &[
            &[
                "{A} had worked at {employer} for many years.",
                "For years {A} had done the same work at {employer}.",
            ],
            &[
                "They made {product} there, and {he} knew all about them.",
                "There {he} learned all about {product}.",
            ],
            &[
                "One {weather} {time} {he} said, \"I want to see my home again.\"",
                "One {time} {he} wanted to go home.",
            ],
            &[
                "So {he} took the road to {town} in {country}.",
                "{He} packed a bag and went back to {town}, far away in {country}.",
            ],
            &[
                "The first thing {he} saw was the {landmark}.",
                "From far off {he} could see the {landmark}.",
            ],
            &[
                "An old friend, {B}, was waiting at the gate.",
                "{B} met {him} at the river {river}.",
            ],
            &[
                "They talked about the old days and ate {dish}.",
                "\"Nothing has changed,\" said {b}.",
            ],
        ],
    },
    Scene {
        slots: &[("time", TIMES), ("place", PLACES)],
        sentences: &[
            &["There was a feast in {town}.", "The people of the town {town} held a feast."],
            &[
                "{A} brought the {instrument} and {B} brought the {instrumentB}.",
                "{A} came with the {instrument}, and {B} came with the {instrumentB}.",
            ],
            &["First {a} played alone.", "They began to play a slow song."],
            &[
                "Then they played together and everybody danced at the {place}.",
                "All the people danced.",
            ],
            &[
                "When they were hungry they ate {townDish}, as people do there.",
                "At midnight there was {townDish} for all.",
            ],
            &["{b} went home late.", "\"We should do this again,\" said {b}."],
        ],
    },
    Scene {
        slots: &[("thing", THINGS), ("time", TIMES)],
        sentences: &[
            &["{A} wanted to buy a {thing} for {B}.", "{A} looked for a gift for {B}."],
            &[
                "But {he} had only {n} coins, and the {thing} cost {m}.",
                "The {thing} in the shop cost {m} coins, and {he} had {n}.",
            ],
            &["A {trade} earns little in the winter.", "\"I am only a poor {trade},\" {he} said."],
            &[
                "So {he} sang in the street and played the {instrument}.",
                "So {he} played the {instrument} on the square until {he} had enough.",
            ],
            &["In the evening {he} bought the {thing}.", "Soon the {thing} was paid for."],
            &["{b} was very happy with it.", "{b} laughed and said, \"I like {dishB} even more.\""],
        ],
    },
    Scene {
        slots: &[("weather", WEATHER), ("place", PLACES)],
        sentences: &[
            &["{A} and {B} had a quarrel.", "One day {A} and {B} were angry with each other."],
            &[
                "{a} said that {dish} was the best food in the world, but {b} wanted {dishB}.",
                "{a} wanted to cook {dish}, and {b} wanted to cook {dishB}.",
            ],
            &["They did not speak for {n} days.", "For a whole week they did not speak."],
            &[
                "Then it was {weather}, and both came to the {place}.",
                "Then they met at the {place} by chance.",
            ],
            &["\"Let us cook both,\" said {b}.", "\"You were right,\" said {a}."],
            &["The {pet} of {a} ate the rest.", "So they were friends again."],
        ],
    },
    Scene {
        slots: &[("time", TIMES), ("weather", WEATHER)],
        sentences: &[
            &[
                "A traveller from {country} came to {townB}.",
                "On a {weather} {time} a traveller came to {townB}.",
            ],
            &[
                "{He0} asked the way to the {landmarkB}.",
                "\"Where is the {landmarkB}?\" the traveller asked.",
            ],
            &["{B}, the {tradeB}, showed the way.", "{B} stopped working and showed the way."],
            &["On the way they talked about music.", "They walked along the river {riverB}."],
            &[
                "\"I have played the {instrumentB} since I was a child,\" said {b}.",
                "{b} told a story about a {petB}.",
            ],
            &[
                "The traveller thanked {himB} and paid for the {townDishB}.",
                "\"Come again,\" said {b}.",
            ],
        ],
    },
    Scene {
        slots: &[("place", PLACES), ("weather", WEATHER)],
        sentences: &[
            &["At {employer} they needed more {product}.", "There was much work at {employer}."],
            &["{A} stayed until midnight, and so did the {pet}.", "{A} worked day and night."],
            &[
                "It was {weather}, and the lights went out.",
                "In the dark somebody knocked at the door.",
            ],
            &["It was {B} with a basket of {dish}.", "{B} stood there and held a pot of {dish}."],
            &["\"Eat first, then work,\" {heB} said.", "\"You must be hungry,\" said {b}."],
            &["By morning all the work was done.", "Then they finished the work together."],
        ],
    },
];

fn pronouns(person: &Person) -> [&'static str; 4] {
    if person.female { ["he", "she", "her", "hers"] } else { ["he", "he", "him", "his"] }
}

/// One story about two people of the world.
pub(super) fn story(world: &World, rng: &mut Rng) -> String {
    let (Some(one), Some(two)) = (rng.choose(&world.people), rng.choose(&world.people)) else {
        return String::new();
    };
    let two = if one.first == two.first {
        // The same person twice: take the next one.
        let at = world.people.iter().position(|p| p.first == one.first).unwrap_or(0);
        world.people.get((at + 1) % world.people.len()).unwrap_or(two)
    } else {
        two
    };
    let mut slots: Slots = Vec::new();
    for (person, second) in [(one, false), (two, true)] {
        let of = |relation: &str| world.object(&person.full, relation).to_string();
        let town = of("birth_town");
        let employer = of("employer");
        let names: [&'static str; 17] = if second {
            [
                "B",
                "b",
                "heB",
                "HeB",
                "himB",
                "hisB",
                "townB",
                "tradeB",
                "instrumentB",
                "dishB",
                "employerB",
                "petB",
                "countryB",
                "landmarkB",
                "riverB",
                "townDishB",
                "productB",
            ]
        } else {
            [
                "A",
                "a",
                "he",
                "He",
                "him",
                "his",
                "town",
                "trade",
                "instrument",
                "dish",
                "employer",
                "pet",
                "country",
                "landmark",
                "river",
                "townDish",
                "product",
            ]
        };
        let [_, he, him, his] = pronouns(person);
        let values = [
            person.full.clone(),
            person.first.clone(),
            he.to_string(),
            super::names::capital(he),
            him.to_string(),
            his.to_string(),
            town.clone(),
            of("trade"),
            of("instrument"),
            of("dish"),
            employer.clone(),
            of("pet"),
            world.object(&town, "town_country").to_string(),
            world.object(&town, "town_landmark").to_string(),
            world.object(&town, "town_river").to_string(),
            world.object(&town, "town_dish").to_string(),
            world.object(&employer, "product").to_string(),
        ];
        slots.extend(names.into_iter().zip(values));
    }
    slots.push(("He0", if rng.below(2) == 0 { "He" } else { "She" }.to_string()));
    rng.choose(STORIES).map(|scene| scene.tell(rng, &slots)).unwrap_or_default()
}
