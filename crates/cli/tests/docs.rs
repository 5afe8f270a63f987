//! The generated parts of the documentation are what the code says.
//!
//! `STRATA_UPDATE_DOCS=1 cargo test -p strata-cli --test docs` rewrites them.

use std::path::Path;

const BEGIN: &str = "<!-- options -->\n";
const END: &str = "<!-- end of options -->\n";

#[test]
fn option_tables_of_the_method_pages_are_up_to_date() {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/methods");
    for card in compress::METHODS {
        let path = pages.join(format!("{}.md", card.slug));
        let page = std::fs::read_to_string(&path)
            .unwrap_or_else(|e| panic!("{} has no page: {e}", card.slug));
        let table = method::options_markdown(&(card.schema)());
        let (before, rest) = page.split_once(BEGIN).expect("the page marks its options");
        let (now, after) = rest.split_once(END).expect("the mark is closed");
        if std::env::var_os("STRATA_UPDATE_DOCS").is_some() {
            std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        } else {
            assert_eq!(now, table, "{}: set STRATA_UPDATE_DOCS=1 to rewrite", path.display());
        }
    }
}

#[test]
fn every_method_has_a_reproduction() {
    for card in compress::METHODS {
        assert!(repro::ALL.iter().any(|r| r.slug == card.slug), "{}", card.slug);
    }
}
