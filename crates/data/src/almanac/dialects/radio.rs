//! The dialect of radio network operations.

use super::Scene;

const SITE: &[&str] =
    &["north", "south", "east", "west", "harbour", "airport", "stadium", "station"];
const ALARM: &[&str] =
    &["link failure", "power loss", "high temperature", "low voltage", "clock drift"];
const PART: &[&str] = &["antenna", "amplifier", "router", "battery", "feeder cable", "radio unit"];
const MEASURE: &[&str] =
    &["throughput", "latency", "call drop rate", "packet loss", "signal level"];
const ACTION: &[&str] = &["restarted", "replaced", "reset", "isolated", "updated"];
const CAUSE: &[&str] = &["interference", "congestion", "a wrong tilt", "a bad handover setting"];

pub(super) const SCENES: &[Scene] = &[
    Scene {
        slots: &[("site", SITE), ("alarm", ALARM), ("part", PART), ("action", ACTION)],
        sentences: &[
            &[
                "Alarm {n} reports {alarm} at the {site} site.",
                "The {site} site raised an alarm for {alarm}.",
            ],
            &["Sector {m} is out of service.", "All carriers in sector {m} are down."],
            &["The field team {action} the {part}.", "The {part} was {action} by the field team."],
            &[
                "After {n} minutes the alarm was cleared.",
                "The alarm cleared and the sector came back.",
            ],
            &["Traffic is back to normal.", "The ticket is closed.", ""],
        ],
    },
    Scene {
        slots: &[("site", SITE), ("site2", SITE), ("measure", MEASURE), ("cause", CAUSE)],
        sentences: &[
            &["The {measure} of cell {n} got worse.", "Cell {n} shows a poor {measure}."],
            &[
                "The cause was {cause} from the {site} site.",
                "The log points to {cause} near the {site} site.",
            ],
            &[
                "We changed the antenna tilt by {k} percent.",
                "The planner lowered the transmit power.",
            ],
            &[
                "The handover margin to the {site2} site was raised.",
                "Load was moved to the {site2} site.",
            ],
            &["The {measure} is within its target again.", "Since then the {measure} is stable."],
        ],
    },
    Scene {
        slots: &[("site", SITE), ("part", PART), ("measure", MEASURE)],
        sentences: &[
            &[
                "Tonight we upgrade the software of the {site} site.",
                "A maintenance window opens for the {site} site.",
            ],
            &[
                "Users will be moved to the neighbour cells first.",
                "Before the work the cells are locked.",
            ],
            &[
                "Then the {part} is checked and the backup is loaded.",
                "The {part} is tested by the engineer on duty.",
            ],
            &[
                "If the {measure} falls, roll back the change.",
                "Watch the {measure} for {n} minutes.",
            ],
            &[
                "Report the result to the operations centre.",
                "The operations centre confirms the end of the work.",
            ],
        ],
    },
    Scene {
        slots: &[("site", SITE), ("measure", MEASURE), ("part", PART)],
        sentences: &[
            &[
                "The backhaul link of the {site} site is at {k} percent load.",
                "The carrier at the {site} site serves {k} users.",
            ],
            &[
                "The spectrum is shared by {n} cells.",
                "The scheduler gives {n} blocks to each user.",
            ],
            &["A spare {part} is on the way.", "The {part} needs a new firmware."],
            &[
                "The dashboard shows the {measure} of the last {m} hours.",
                "The {measure} was measured in a drive test.",
            ],
        ],
    },
];

pub(super) const GLOSSARY: &[(&str, &str)] = &[
    ("a handover", "moves a call from one cell to the next"),
    ("a backhaul link", "carries traffic from the site to the core network"),
    ("an antenna tilt", "sets how far a cell reaches"),
    ("a sector", "is the area that one antenna serves"),
    ("an alarm", "tells the operations centre about a fault"),
    ("a carrier", "is a band of spectrum that a cell uses"),
    ("interference", "is noise from a cell on the same frequency"),
    ("congestion", "means that more users want to send than the cell can serve"),
    ("a drive test", "measures the signal on the road"),
    ("the scheduler", "decides which user may send"),
    ("a rollback", "brings back the old software"),
    ("latency", "is the time that a packet needs"),
    ("throughput", "is the amount of data in one second"),
    ("packet loss", "counts the packets that never arrive"),
    ("a maintenance window", "is the time in which work is allowed"),
    ("a neighbour cell", "takes over users at the border"),
    ("the core network", "connects the sites with the internet"),
    ("an amplifier", "makes a radio signal stronger"),
];
