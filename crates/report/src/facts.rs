//! A JSON value (what a claim measured) as a table for people.

use serde_json::{Map, Value};

use crate::{Cell, Column, Table, human};

/// Objects of like objects, and lists of objects, become a matrix; other objects become one row
/// per leaf with its path; a bare value becomes a single cell. Empty values give an empty table.
pub(crate) fn table(title: &str, value: &Value) -> Table {
    match value {
        Value::Object(map) if !map.is_empty() && map.values().all(is_flat_object) => {
            let rows = map.iter().filter_map(|(k, v)| Some((Some(k.as_str()), v.as_object()?)));
            matrix(title, rows.collect())
        }
        Value::Array(list) if !list.is_empty() && list.iter().all(is_flat_object) => {
            matrix(title, list.iter().filter_map(|v| Some((None, v.as_object()?))).collect())
        }
        Value::Null => Table::new(title, Vec::new()),
        _ => {
            let mut table = Table::new(title, vec![Column::left(""), Column::right("")]);
            leaves("", value, &mut table);
            table
        }
    }
}

fn is_flat_object(value: &Value) -> bool {
    value.as_object().is_some_and(|map| !map.is_empty() && map.values().all(|v| !v.is_object()))
}

fn matrix(title: &str, rows: Vec<(Option<&str>, &Map<String, Value>)>) -> Table {
    let mut keys: Vec<&str> = Vec::new();
    for (_, map) in &rows {
        for key in map.keys() {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
    }
    let named = rows.iter().any(|(name, _)| name.is_some());
    let mut columns: Vec<Column> = if named { vec![Column::left("")] } else { Vec::new() };
    for key in &keys {
        let text = rows.iter().any(|(_, map)| map.get(*key).is_some_and(Value::is_string));
        columns.push(if text { Column::left(*key) } else { Column::right(*key) });
    }
    let mut table = Table::new(title, columns);
    for (name, map) in rows {
        let values = keys.iter().map(|key| map.get(*key).map_or(Cell::Empty, cell));
        let name = named.then(|| Cell::text(name.unwrap_or_default()));
        table.push(name.into_iter().chain(values).collect());
    }
    table
}

fn leaves(path: &str, value: &Value, table: &mut Table) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path} · {key}") };
                leaves(&path, inner, table);
            }
        }
        Value::Array(list) if list.iter().any(|v| v.is_object() || v.is_array()) => {
            for (i, inner) in list.iter().enumerate() {
                let path = if path.is_empty() { i.to_string() } else { format!("{path} · {i}") };
                leaves(&path, inner, table);
            }
        }
        _ => table.push(vec![Cell::text(path), cell(value)]),
    }
}

fn cell(value: &Value) -> Cell {
    match value {
        Value::Array(list) => Cell::Text(list.iter().map(plain).collect::<Vec<_>>().join(", ")),
        Value::Null => Cell::Empty,
        other => Cell::Text(plain(other)),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(whole), _) => whole.to_string(),
            (None, Some(number)) => human::short(number, 5),
            _ => n.to_string(),
        },
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_string(),
        Value::Null => "–".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn like_objects_become_a_matrix_and_others_a_list() {
        let t = table("t", &json!({"rtn": {"3": 9.5, "4": 7}, "awq": {"3": 8.123456}}));
        assert_eq!(t.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["", "3", "4"]);
        assert_eq!(t.rows[0], ["rtn".into(), Cell::text("9.5"), Cell::text("7")]);
        assert_eq!(t.rows[1], ["awq".into(), Cell::text("8.1235"), Cell::Empty]);
        let t = table("t", &json!({"a": 1, "b": {"c": [1, 2]}}));
        assert_eq!(t.rows[1], [Cell::text("b · c"), Cell::text("1, 2")]);
        assert!(table("t", &Value::Null).rows.is_empty());
        assert!(table("t", &json!({})).rows.is_empty());
    }
}
