//! The dialect of contract law.

use super::Scene;

const PARTY: &[&str] =
    &["the seller", "the buyer", "the tenant", "the landlord", "the supplier", "the licensee"];
const PARTY_CAP: &[&str] =
    &["The seller", "The buyer", "The tenant", "The landlord", "The supplier", "The licensee"];
const DUTY: &[&str] =
    &["payment", "delivery", "insurance", "repair", "confidentiality", "inspection"];
const REMEDY: &[&str] =
    &["damages", "a refund", "specific performance", "a penalty", "compensation"];
const DOCUMENT: &[&str] = &["lease", "agreement", "licence", "deed", "purchase order"];

pub(super) const SCENES: &[Scene] = &[
    Scene {
        slots: &[("Party", PARTY_CAP), ("other", PARTY), ("duty", DUTY), ("remedy", REMEDY)],
        sentences: &[
            &[
                "{Party} shall be responsible for {duty} under clause {n}.",
                "Under clause {n}, {duty} is an obligation of {other}.",
            ],
            &[
                "A failure to perform is a breach of this contract.",
                "Any delay of more than {m} days is a material breach.",
            ],
            &[
                "In that case {other} may claim {remedy}.",
                "The injured party is entitled to {remedy}.",
            ],
            &[
                "Notice of the breach shall be given in writing.",
                "A written notice must be served within {m} days.",
            ],
            &[
                "Nothing in this clause limits liability for fraud.",
                "This clause survives termination.",
            ],
        ],
    },
    Scene {
        slots: &[("document", DOCUMENT), ("other", PARTY), ("remedy", REMEDY)],
        sentences: &[
            &[
                "This {document} is made between the parties named in the schedule.",
                "The parties hereby enter into this {document}.",
            ],
            &["It takes effect on the date of signature.", "It remains in force for {n} months."],
            &[
                "Either party may terminate it by notice of {m} days.",
                "It may be renewed by mutual consent.",
            ],
            &[
                "Upon termination {other} shall return all documents.",
                "Accrued rights of {other} are not affected.",
            ],
            &[
                "Disputes shall be referred to arbitration.",
                "The governing law is that of the seat of arbitration.",
            ],
        ],
    },
    Scene {
        slots: &[("document", DOCUMENT), ("Party", PARTY_CAP), ("duty", DUTY)],
        sentences: &[
            &[
                "{Party} warrants that the statements in the {document} are true.",
                "{Party} gives a warranty as to {duty}.",
            ],
            &[
                "The warranty expires after {n} months.",
                "A false warranty makes the {document} voidable.",
            ],
            &[
                "Neither party is liable for force majeure.",
                "Liability is capped at {k} percent of the price.",
            ],
            &[
                "The court held that the clause was void.",
                "The court held that the term was implied.",
            ],
            &["The appeal was dismissed with costs.", "The claimant was awarded costs."],
        ],
    },
    Scene {
        slots: &[("other", PARTY), ("document", DOCUMENT), ("remedy", REMEDY)],
        sentences: &[
            &[
                "The claimant sued {other} for breach of the {document}.",
                "The claimant sought {remedy} from {other}.",
            ],
            &[
                "The defendant argued that no consideration was given.",
                "The defendant relied on the exclusion clause.",
            ],
            &[
                "The judge found that an offer had been accepted.",
                "The judge found that the clause was clear.",
            ],
            &["Therefore {other} had to pay {remedy}.", "Judgment was entered against {other}."],
        ],
    },
];

pub(super) const GLOSSARY: &[(&str, &str)] = &[
    ("a breach", "is a failure to perform a contract"),
    ("a warranty", "is a promise that a statement is true"),
    ("consideration", "is the price given for a promise"),
    ("an offer", "becomes a contract when it is accepted"),
    ("a clause", "is one numbered rule of a contract"),
    ("damages", "are money paid for a loss"),
    ("a lease", "gives the use of land for rent"),
    ("arbitration", "settles a dispute without a court"),
    ("a notice", "informs the other party in writing"),
    ("termination", "brings a contract to its end"),
    ("force majeure", "excuses a party when disaster strikes"),
    ("liability", "is the duty to answer for a loss"),
    ("a licence", "permits the use of a right"),
    ("a deed", "is a promise under seal"),
    ("specific performance", "orders a party to do what was promised"),
    ("an exclusion clause", "limits what a party must pay"),
    ("the claimant", "brings the case to court"),
    ("the defendant", "answers the case in court"),
];
