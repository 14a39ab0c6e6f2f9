//! The difficulty of a Spider query: one of the four classes of the official evaluation
//! (`Evaluator.eval_hardness` in evaluation.py of taoyds/spider), counted from the words of the
//! query.
//!
//! The counts follow the quirks of the official ones. Only the first of several queries joined by
//! UNION, INTERSECT or EXCEPT counts; an ORDER BY after such a word belongs to the second query. A
//! subquery counts only in conditions, and its own components never count. Aggregates include every
//! NOT of a condition and every AND and OR of HAVING.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    Easy,
    Medium,
    Hard,
    Extra,
}

/// What the official evaluation counts in a query.
#[derive(Debug, Default)]
struct Counts {
    /// WHERE, GROUP BY, ORDER BY, LIMIT, JOIN, OR, LIKE: "components 1".
    plain: usize,
    /// Queries within conditions or behind a set operation: "components 2".
    nested: usize,
    aggregates: usize,
    /// Selected columns, conditions of WHERE and columns of GROUP BY, not counting the first of
    /// each.
    more_columns: usize,
    more_conditions: usize,
    more_groups: usize,
}

impl fmt::Display for Difficulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Difficulty::Easy => "easy",
            Difficulty::Medium => "medium",
            Difficulty::Hard => "hard",
            Difficulty::Extra => "extra",
        })
    }
}

impl Counts {
    /// Number of kinds that occur more than once: "others".
    fn others(&self) -> usize {
        let more = [self.aggregates.saturating_sub(1), self.more_columns, self.more_conditions, self.more_groups];
        more.iter().filter(|&&count| count > 0).count()
    }
}

/// Classifies a query.
pub fn difficulty(query: &str) -> Difficulty {
    let counts = count(&words(query));
    match (counts.plain, counts.others(), counts.nested) {
        (0..=1, 0, 0) => Difficulty::Easy,
        (0..=1, 0..=2, 0) | (2, 0..=1, 0) => Difficulty::Medium,
        (0..=2, 3.., 0) | (3, 0..=2, 0) | (0..=1, 0, 1) => Difficulty::Hard,
        // Queries with two components and two others match no rule of the first three classes.
        _ => Difficulty::Extra,
    }
}

/// Counts the components of the first of several joined queries, word by word. Words in parentheses
/// belong to the word before them.
fn count(words: &[String]) -> Counts {
    let mut counts = Counts::default();
    let (mut clause, mut depth, mut between) = ("", 0usize, false);
    for (index, word) in words.iter().enumerate() {
        let next = words.get(index + 1).map_or("", String::as_str);
        let conditions = matches!(clause, "from" | "where" | "having");
        match word.as_str() {
            "(" => {
                let table = clause == "from" && index > 0 && opens_table(&words[index - 1]);
                counts.nested += usize::from(depth == 0 && conditions && next == "select" && !table);
                depth += 1;
            }
            ")" => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            "select" | "from" | "having" => clause = word,
            "where" | "group" | "order" | "limit" => {
                counts.plain += 1;
                clause = word;
            }
            "union" | "intersect" | "except" => {
                counts.nested += 1;
                break;
            }
            "join" => counts.plain += 1,
            "," => match clause {
                "select" => counts.more_columns += 1,
                "group" => counts.more_groups += 1,
                "from" => counts.plain += 1,
                _ => {}
            },
            "between" => between = true,
            "and" if between => between = false,
            "and" | "or" => {
                counts.plain += usize::from(word == "or" && conditions);
                counts.more_conditions += usize::from(clause == "where");
                counts.aggregates += usize::from(clause == "having");
            }
            "like" if conditions => counts.plain += 1,
            "not" if matches!(clause, "where" | "having") => counts.aggregates += 1,
            "max" | "min" | "count" | "sum" | "avg" if next == "(" && matches!(clause, "select" | "order") => {
                counts.aggregates += 1;
            }
            _ => {}
        }
    }
    counts
}

/// Whether a query in parentheses after this word is a table rather than part of a condition.
fn opens_table(before: &str) -> bool {
    matches!(before, "from" | "join" | ",")
}

/// Splits a query into lower-case words and single other characters. A quoted text becomes one
/// word, which is no keyword.
fn words(query: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = query.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '\'' | '"' | '`' => rest[1..].find(first).map_or(rest.len(), |end| end + 2),
            c if is_word_char(c) => rest.find(|c| !is_word_char(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        words.push(rest[..length].to_lowercase());
        rest = rest[length..].trim_start();
    }
    words
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.')
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::Difficulty::{Easy, Extra, Hard, Medium};
    use cllm_core::task::Task;

    use super::*;

    #[test]
    fn queries_have_their_official_classes() {
        for (expected, query) in [
            (Easy, "SELECT count(*) FROM singer"),
            (Easy, "SELECT name FROM singer WHERE age > 20"),
            (Easy, "SELECT name FROM singer ORDER BY age DESC"),
            (Easy, "SELECT DISTINCT country FROM singer WHERE note = 'this or that, and (select) more'"),
            (Easy, "SELECT name FROM t WHERE a BETWEEN 1 AND 5"),
            (Easy, "SELECT name FROM t WHERE a NOT IN ('x', 'y')"),
            (Easy, "SELECT count(DISTINCT a) FROM t GROUP BY b"),
            (Medium, "SELECT name, age FROM singer"),
            (Medium, "SELECT name FROM t WHERE name LIKE '%a%'"),
            (Medium, "SELECT name FROM singer ORDER BY age DESC LIMIT 1"),
            (Medium, "SELECT avg(age), min(age), max(age) FROM singer WHERE country = 'France'"),
            (Medium, "SELECT name FROM t WHERE a = 1 AND b = 2"),
            (Medium, "SELECT a FROM t WHERE b = 1 OR c = 2"),
            (Medium, "SELECT T1.a FROM t AS T1 JOIN u AS T2 ON T1.id = T2.id WHERE T2.b = 'x'"),
            (Medium, "SELECT a, count(*) FROM t GROUP BY a HAVING count(*) > 1"),
            (Easy, "SELECT count(*) FROM (SELECT a FROM t UNION SELECT b FROM u)"),
            (Hard, "SELECT name FROM t WHERE age > (SELECT avg(age) FROM t)"),
            (Hard, "SELECT a FROM t UNION SELECT b FROM u ORDER BY b LIMIT 3"),
            (Hard, "SELECT T1.a FROM t AS T1 JOIN u AS T2 ON T1.id = T2.id WHERE T2.b = 1 GROUP BY T1.a"),
            (Hard, "SELECT T1.a, T1.c FROM t AS T1 JOIN u AS T2 ON T1.id = T2.id GROUP BY T1.a ORDER BY count(*) DESC"),
            (Hard, "SELECT count(*), avg(a), b FROM t WHERE c = 1 AND d = 2 GROUP BY b, e"),
            (Extra, "SELECT a, b FROM t WHERE c = 1 AND d = 2 ORDER BY e"),
            (Extra, "SELECT a, b FROM t WHERE c > (SELECT avg(c) FROM t)"),
            (
                Extra,
                "SELECT T1.a FROM t AS T1 JOIN u AS T2 ON T1.id = T2.id GROUP BY T1.a ORDER BY count(*) DESC LIMIT 1",
            ),
            (Extra, "SELECT a FROM t WHERE b NOT IN (SELECT b FROM u) AND c IN (SELECT c FROM v)"),
            (Hard, "SELECT a FROM t WHERE b = 1 INTERSECT SELECT a FROM t WHERE c IN (SELECT c FROM u) ORDER BY a"),
        ] {
            assert_eq!(difficulty(query), expected, "{query}: {:?}", count(&words(query)));
        }
    }

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_real_questions_have_the_published_classes() {
            let mut counts: BTreeMap<Difficulty, usize> = BTreeMap::new();
            for sample in Task::Spider.load(&cllm_testing::benchmark_data("spider"), "dev").unwrap() {
                *counts.entry(difficulty(sample.reference.as_deref().unwrap())).or_default() += 1;
            }
            assert_eq!(counts, BTreeMap::from([(Easy, 248), (Medium, 446), (Hard, 174), (Extra, 166)]));
        }
    }
}
