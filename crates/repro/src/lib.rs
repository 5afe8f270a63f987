//! A paper's claim, one file per slug
