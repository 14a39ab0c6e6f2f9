//! Results of queries, and when two of them are equal: as the official judge of Spider has it, the
//! columns may permute, and the rows too unless their order counts.

use std::collections::HashMap;

use rusqlite::Row;
use rusqlite::types::ValueRef;

/// Digits of a real number that count: averages differ in the last ones by the order of additions.
const SIGNIFICANT_DIGITS: usize = 12;

/// Bytes of two results: of their different texts, and of the number of every value.
const MAX_BYTES: usize = 256 << 20;

/// A value. Equal values have the same form: 1 and 1.0 do.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Value {
    Null,
    Integer(i64),
    /// The bits of a number that is no integer of 64 bits.
    Real(u64),
    Text(String),
    Blob(Vec<u8>),
}

impl Value {
    /// Bytes of a text that are not UTF-8 are left out.
    fn new(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Value::Null,
            ValueRef::Integer(number) => Value::Integer(number),
            ValueRef::Real(number) => Value::from_real(number),
            ValueRef::Text(bytes) => Value::Text(bytes.utf8_chunks().map(|chunk| chunk.valid()).collect()),
            ValueRef::Blob(bytes) => Value::Blob(bytes.to_owned()),
        }
    }

    fn from_real(number: f64) -> Self {
        let rounded = format!("{number:.*e}", SIGNIFICANT_DIGITS - 1).parse().unwrap_or(number);
        // Whole numbers are exact: rounding would change the large ones.
        let number = if number.fract() == 0.0 { number } else { rounded };
        let integer = number as i64;
        if integer as f64 == number && integer < i64::MAX {
            Value::Integer(integer)
        } else {
            Value::Real(number.to_bits())
        }
    }
}

/// Numbers the values of several results, so that equal values have equal numbers.
#[derive(Default)]
pub(super) struct ValueIds {
    ids: HashMap<Value, u32>,
    num_bytes: usize,
}

impl ValueIds {
    /// # Errors
    /// When all values are too large to hold.
    fn id(&mut self, value: ValueRef<'_>) -> rusqlite::Result<u32> {
        let num_text_bytes = value.as_bytes_or_null().ok().flatten().map_or(0, <[u8]>::len);
        self.num_bytes += size_of::<u32>();
        // Before anything is copied.
        if self.num_bytes + num_text_bytes > MAX_BYTES {
            return Err(rusqlite::Error::InvalidQuery);
        }
        let next = self.ids.len() as u32;
        let id = *self.ids.entry(Value::new(value)).or_insert(next);
        if id == next {
            self.num_bytes += size_of::<Value>() + num_text_bytes;
        }
        Ok(id)
    }
}

/// The result of a query, by column. The values are numbers of the same [`ValueIds`].
pub(super) struct ResultTable {
    columns: Vec<Vec<u32>>,
    num_rows: usize,
}

impl ResultTable {
    pub(super) fn new(num_columns: usize) -> Self {
        ResultTable { columns: vec![Vec::new(); num_columns], num_rows: 0 }
    }

    /// # Errors
    /// When a value cannot be read or held.
    pub(super) fn push_row(&mut self, row: &Row<'_>, ids: &mut ValueIds) -> rusqlite::Result<()> {
        for (index, column) in self.columns.iter_mut().enumerate() {
            column.push(ids.id(row.get_ref(index)?)?);
        }
        self.num_rows += 1;
        Ok(())
    }

    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Whether some permutation of the columns, and of the rows unless `is_ordered`, makes the
    /// results equal. Empty results are equal whatever their columns.
    pub(super) fn is_equal(&self, other: &ResultTable, is_ordered: bool) -> bool {
        if self.num_rows != other.num_rows || self.num_rows == 0 {
            return self.num_rows == other.num_rows;
        }
        if self.columns.len() != other.columns.len() {
            return false;
        }
        if is_ordered {
            return sorted(self.columns.clone()) == sorted(other.columns.clone());
        }
        let no_class = || vec![0; self.num_rows];
        sorted(self.sorted_rows()) == sorted(other.sorted_rows())
            && self.match_columns(other, 0, &mut vec![false; other.columns.len()], [&no_class(), &no_class()])
    }

    /// The rows, each with its values sorted. If these differ, no permutation of columns helps.
    fn sorted_rows(&self) -> Vec<Vec<u32>> {
        (0..self.num_rows).map(|row| sorted(self.columns.iter().map(|column| column[row]).collect())).collect()
    }

    /// Finds columns of `other` for the columns from `first` on. `classes` number the rows of both
    /// results so that rows which are equal in the columns before have the same number.
    fn match_columns(&self, other: &ResultTable, first: usize, is_used: &mut [bool], classes: [&[u32]; 2]) -> bool {
        let Some(column) = self.columns.get(first) else { return true };
        for candidate in 0..other.columns.len() {
            let is_repeated = (0..candidate).any(|at| !is_used[at] && other.columns[at] == other.columns[candidate]);
            if is_used[candidate] || is_repeated {
                continue;
            }
            let mut ids = HashMap::new();
            let refined = refine(classes[0], column, &mut ids);
            let of_other = refine(classes[1], &other.columns[candidate], &mut ids);
            if sorted(refined.clone()) == sorted(of_other.clone()) {
                is_used[candidate] = true;
                if self.match_columns(other, first + 1, is_used, [&refined, &of_other]) {
                    return true;
                }
                is_used[candidate] = false;
            }
        }
        false
    }
}

/// Divides the classes of rows by their values in one more column.
fn refine(classes: &[u32], column: &[u32], ids: &mut HashMap<(u32, u32), u32>) -> Vec<u32> {
    let number = |(&class, &value)| {
        let next = ids.len() as u32;
        *ids.entry((class, value)).or_insert(next)
    };
    classes.iter().zip(column).map(number).collect()
}

fn sorted<T: Ord>(mut items: Vec<T>) -> Vec<T> {
    items.sort_unstable();
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[&[u32]]) -> ResultTable {
        let columns = (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column]).collect()).collect();
        ResultTable { columns, num_rows: rows.len() }
    }

    #[test]
    fn equal_values_have_one_form() {
        let same = |a: ValueRef<'_>, b: ValueRef<'_>| Value::new(a) == Value::new(b);
        for (integer, real) in [(1025, 1025.0), (0, -0.0), (1 << 53, 9007199254740992.0), (-3, -3.0000000000000004)] {
            assert!(same(ValueRef::Integer(integer), ValueRef::Real(real)), "{integer} {real}");
        }
        for (a, b) in [(11.35, 11.350000000000001), (0.1 + 0.2, 0.3), (f64::INFINITY, f64::INFINITY), (1e300, 1e300)] {
            assert!(same(ValueRef::Real(a), ValueRef::Real(b)), "{a} {b}");
        }
        for (a, b) in [(11.35, 11.36), (0.1, 0.10000001), (123456789.25, 123456789.75)] {
            assert!(!same(ValueRef::Real(a), ValueRef::Real(b)), "{a} {b}");
        }
        assert!(!same(ValueRef::Integer((1 << 53) + 1), ValueRef::Real(9007199254740992.0)));
        assert!(!same(ValueRef::Integer(i64::MAX), ValueRef::Real(9223372036854775807.0)));
        assert!(same(ValueRef::Text(b"\xff41"), ValueRef::Text(b"41")), "undecodable bytes are ignored");
        for (a, b) in [
            (ValueRef::Integer(1), ValueRef::Text(b"1")),
            (ValueRef::Text(b"a"), ValueRef::Blob(b"a")),
            (ValueRef::Null, ValueRef::Text(b"")),
            (ValueRef::Null, ValueRef::Integer(0)),
            (ValueRef::Text(b"a"), ValueRef::Text(b"A")),
        ] {
            assert!(!same(a, b), "{a:?} {b:?}");
        }
    }

    #[test]
    fn columns_permute_as_wholes() {
        let expected = table(&[&[1, 2, 9], &[3, 4, 9]]);
        for (rows, is_equal, is_equal_in_order) in [
            (table(&[&[1, 2, 9], &[3, 4, 9]]), true, true),
            (table(&[&[9, 2, 1], &[9, 4, 3]]), true, true),
            (table(&[&[9, 4, 3], &[9, 2, 1]]), true, false),
            (table(&[&[2, 1, 9], &[3, 4, 9]]), false, false),
            (table(&[&[1, 4, 9], &[3, 2, 9]]), false, false),
            (table(&[&[1, 2, 9]]), false, false),
            (table(&[&[1, 2], &[3, 4]]), false, false),
            (table(&[&[1, 2, 9], &[1, 2, 9]]), false, false),
        ] {
            assert_eq!(expected.is_equal(&rows, false), is_equal, "{:?}", rows.columns);
            assert_eq!(expected.is_equal(&rows, true), is_equal_in_order, "{:?}", rows.columns);
        }
    }

    #[test]
    fn rows_are_counted() {
        assert!(table(&[&[1], &[1], &[2]]).is_equal(&table(&[&[2], &[1], &[1]]), false));
        assert!(!table(&[&[1], &[1], &[2]]).is_equal(&table(&[&[2], &[2], &[1]]), false));
        assert!(!table(&[&[1], &[1]]).is_equal(&table(&[&[1]]), false));
        assert!(ResultTable::new(1).is_equal(&ResultTable::new(3), true), "nothing is nothing");
        assert!(!ResultTable::new(1).is_equal(&table(&[&[1]]), false));
    }

    #[test]
    fn a_wrong_choice_of_columns_is_taken_back() {
        // The first two columns hold the same values, and only the third tells which is which.
        let expected = table(&[&[1, 2, 1], &[2, 1, 2], &[1, 1, 3], &[2, 2, 4]]);
        assert!(expected.is_equal(&table(&[&[2, 1, 1], &[1, 2, 2], &[1, 1, 3], &[2, 2, 4]]), false));
        assert!(!expected.is_equal(&table(&[&[1, 2, 1], &[2, 1, 2], &[1, 1, 4], &[2, 2, 3]]), false));
        // Twenty equal columns are one choice, not 20! of them.
        let wide = |last: u32| table(&[&[&[1; 20][..], &[last, 2]].concat(), &[&[1; 20][..], &[2, last]].concat()]);
        assert!(wide(3).is_equal(&wide(3), false) && !wide(3).is_equal(&wide(4), false));
    }
}
