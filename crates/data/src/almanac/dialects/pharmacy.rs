//! The dialect of pharmacy, with invented medicines.

use super::Scene;

const DRUG: &[&str] = &[
    "velarin",
    "tramoxil",
    "cordapine",
    "sulvexin",
    "ibrolan",
    "pentacor",
    "nystadol",
    "quinasol",
];
const FORM: &[&str] = &["tablet", "capsule", "syrup", "ointment", "injection", "inhaler"];
const SYMPTOM: &[&str] = &["fever", "nausea", "headache", "rash", "dizziness", "cough", "swelling"];
const PATIENT: &[&str] = &["adults", "children", "elderly patients", "pregnant women", "diabetics"];
const TIME: &[&str] =
    &["before meals", "after meals", "at bedtime", "every morning", "twice daily"];

pub(super) const SCENES: &[Scene] = &[
    Scene {
        slots: &[("drug", DRUG), ("form", FORM), ("symptom", SYMPTOM), ("time", TIME)],
        sentences: &[
            &[
                "The prescription is for {drug}, one {form}, {time}.",
                "Dispense {drug} as a {form} with {n} milligrams.",
            ],
            &["It treats {symptom} and similar complaints.", "The indication is {symptom}."],
            &[
                "The patient should take it {time} with water.",
                "The usual dose is {n} milligrams {time}.",
            ],
            &["Do not exceed {k} milligrams per day.", "The maximum daily dose is {k} milligrams."],
            &[
                "Store it in a dry place below {m} degrees.",
                "Keep the medicine out of reach of children.",
            ],
        ],
    },
    Scene {
        slots: &[("drug", DRUG), ("drug2", DRUG), ("symptom", SYMPTOM), ("patient", PATIENT)],
        sentences: &[
            &[
                "{drug} interacts with {drug2}.",
                "The combination of {drug} and {drug2} is contraindicated.",
            ],
            &["Together they may cause {symptom}.", "The main side effect is {symptom}."],
            &["In {patient} the dose must be halved.", "It is not recommended for {patient}."],
            &[
                "Check the renal function after {n} days.",
                "Monitor the blood pressure for {n} days.",
            ],
            &[
                "If {symptom} occurs, stop the treatment.",
                "Ask the pharmacist in case of overdose.",
            ],
        ],
    },
    Scene {
        slots: &[("drug", DRUG), ("form", FORM), ("symptom", SYMPTOM), ("symptom2", SYMPTOM)],
        sentences: &[
            &[
                "The patient complains of {symptom} and {symptom2}.",
                "A patient with {symptom} came to the counter.",
            ],
            &[
                "The pharmacist recommends {drug} as a {form}.",
                "A generic {form} of {drug} is in stock.",
            ],
            &["An allergy to {drug} must be ruled out.", "The label warns about {symptom2}."],
            &["The refill is due in {n} days.", "The package holds {n} doses."],
            &["The expiry date is printed on the label.", "Shake the bottle before use.", ""],
        ],
    },
    Scene {
        slots: &[("drug", DRUG), ("patient", PATIENT), ("symptom", SYMPTOM)],
        sentences: &[
            &[
                "In the trial {n} of {m} subjects received {drug}.",
                "A placebo was given to {n} subjects, {drug} to {m}.",
            ],
            &[
                "The active ingredient is absorbed within {n} minutes.",
                "The half life in {patient} is {n} hours.",
            ],
            &[
                "Fewer cases of {symptom} were reported.",
                "The most common adverse event was {symptom}.",
            ],
            &["The agency approved it for {patient}.", "The leaflet was revised."],
        ],
    },
];

pub(super) const GLOSSARY: &[(&str, &str)] = &[
    ("a prescription", "is a written order for a medicine"),
    ("a dose", "is the amount taken at one time"),
    ("a side effect", "is an unwanted effect of a medicine"),
    ("a contraindication", "is a reason not to give a medicine"),
    ("a placebo", "looks like a medicine but holds none"),
    ("an ointment", "is spread on the skin"),
    ("an inhaler", "brings a medicine into the lungs"),
    ("a generic", "holds the same active ingredient at a lower price"),
    ("an overdose", "is more than the body can bear"),
    ("the half life", "is the time until half of the medicine is gone"),
    ("an allergy", "is a harmful answer of the body to a substance"),
    ("a refill", "gives the same medicine again"),
    ("the expiry date", "tells when a medicine must be thrown away"),
    ("the leaflet", "explains how to use a medicine"),
    ("an interaction", "changes the effect of two medicines taken together"),
    ("a capsule", "is swallowed whole"),
    ("an indication", "is a complaint that a medicine treats"),
    ("the pharmacist", "prepares and explains medicines"),
];
