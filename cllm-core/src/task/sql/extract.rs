//! Takes the query out of an answer: of the last fenced block that holds one, or else of the text
//! around the blocks, where prose may stand before it and after it, or else of a block that holds
//! more than SQL (JSON with the query in a string, the session of a shell).

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use super::lexer::{Kind, tokens};
use crate::task::answer::{FencedBlock, FencedText};

/// Words with which a line continues a query.
const CLAUSE_WORDS: [&str; 33] = [
    "from",
    "where",
    "group",
    "order",
    "having",
    "limit",
    "offset",
    "union",
    "intersect",
    "except",
    "join",
    "left",
    "right",
    "full",
    "inner",
    "outer",
    "cross",
    "natural",
    "on",
    "using",
    "and",
    "or",
    "as",
    "in",
    "is",
    "not",
    "like",
    "glob",
    "between",
    "collate",
    "asc",
    "desc",
    "window",
];
/// Words after which a keyword continues a statement.
const WORDS_BEFORE_PART: [&str; 10] =
    ["union", "all", "intersect", "except", "as", "exists", "in", "from", "explain", "plan"];

/// How many keywords of a text in prose may begin its query, the last ones, and how many positions after
/// each may end it besides the end of its statement, the first ones. All that follows is read for each.
const MAX_TRIED: usize = 256;

/// The query of an answer, as `SELECT`, `WITH` or `VALUES` begins it, without its semicolon.
///
/// A fenced block gives its first query, whether SQLite can run it or not. Prose does not mark where
/// a query begins and ends, so there it is what `accepts` says that SQLite can run, and the last one
/// counts; of statements that directly follow each other, the first one does.
pub(super) fn find_query(answer: &str, accepts: impl Fn(&str) -> bool) -> Option<String> {
    // An answer that repeats itself has few texts, but at many places.
    let known = RefCell::new(HashMap::new());
    let accepts =
        |query: &str| *known.borrow_mut().entry(blake3::hash(query.as_bytes())).or_insert_with(|| accepts(query));
    let FencedText { blocks, unfenced } = FencedText::read(answer);
    let texts: Vec<String> = blocks.iter().map(block_text).collect();
    let of_block = || texts.iter().rev().find_map(|text| first_query(text)).map(str::to_owned);
    let within_block = || texts.iter().rev().find_map(|text| last_accepted_string(text, accepts));
    of_block().or_else(|| last_accepted_string(&unfenced, accepts)).or_else(within_block)
}

/// What a block holds, with a query that begins beside the language on the line of the fence.
fn block_text(block: &FencedBlock) -> String {
    let begins = |keyword: &Keyword| keyword.is_query && !keyword.lead.contains(char::is_whitespace);
    match Keyword::find(block.info, 0).filter(begins) {
        Some(keyword) => format!("{}\n{}", &block.info[keyword.start..], block.content),
        None => block.content.clone(),
    }
}

/// The query of a text, or of the strings of the JSON in it, which may hold escapes.
fn last_accepted_string(text: &str, accepts: impl Fn(&str) -> bool) -> Option<String> {
    let json = text.find('{').zip(text.rfind('}')).and_then(|(start, end)| text.get(start..=end));
    let mut strings = Vec::new();
    if let Some(value) = json.and_then(|json| serde_json::from_str(json).ok()) {
        add_strings(value, &mut strings);
    }
    let of_json = strings.iter().rev().find_map(|string| last_accepted(string, &accepts));
    of_json.or_else(|| last_accepted(text, &accepts)).map(str::to_owned)
}

fn add_strings(value: Value, strings: &mut Vec<String>) {
    match value {
        Value::String(string) => strings.push(string),
        Value::Array(items) => items.into_iter().for_each(|item| add_strings(item, strings)),
        Value::Object(fields) => fields.into_iter().for_each(|(_, field)| add_strings(field, strings)),
        _ => {}
    }
}

fn first_query(block: &str) -> Option<&str> {
    let mut next = 0;
    loop {
        let keyword = Keyword::find(block, next)?;
        let end = statement_end(block, keyword.start);
        let begins_statement = keyword.is_first_of_line() || keyword.lead.ends_with(':');
        if begins_statement && keyword.is_query {
            return Some(block[keyword.start..end].trim());
        }
        next = if begins_statement { end } else { keyword.end };
    }
}

fn last_accepted(text: &str, accepts: impl Fn(&str) -> bool) -> Option<&str> {
    let starts: Vec<usize> = Keyword::beginning_statements(text, 0).map(|keyword| keyword.start).collect();
    let mut next = starts.len().checked_sub(MAX_TRIED).map_or(0, |first| starts[first]);
    let (mut last, mut last_end) = (None, None);
    while let Some(keyword) = Keyword::find(text, next) {
        let start = keyword.start;
        let end = keyword.closing_delimiter(text).unwrap_or_else(|| statement_end(text, start));
        if !keyword.is_query {
            let is_statement = keyword.is_first_of_line() && keyword.is_capital();
            next = if is_statement { paragraph_end(text, start).min(end) } else { keyword.end };
            continue;
        }
        let may_begin = keyword.is_first_of_line() || keyword.follows_punctuation() || keyword.is_capital();
        let accepted = ends(text, start, end).find(|&end| may_begin && accepts(text[start..end].trim()));
        if let Some(accepted) = accepted {
            let is_same_script = last_end.is_some_and(|last: usize| is_separator(&text[last..start]));
            let query = text[start..accepted].trim_end_matches(|c: char| c == ';' || c.is_whitespace());
            last = if is_same_script { last } else { Some(query) };
            last_end = Some(accepted);
        }
        next = accepted.unwrap_or(keyword.end);
    }
    last
}

/// A word with which a statement may begin.
struct Keyword<'a> {
    text: &'a str,
    start: usize,
    end: usize,
    is_query: bool,
    /// What stands before it on its line.
    lead: &'a str,
}

impl<'a> Keyword<'a> {
    /// The first keyword from a position on that stands in no comment and continues no statement.
    fn find(text: &'a str, from: usize) -> Option<Self> {
        Self::beginning_statements(text, from).find(|keyword| !keyword.is_in_comment(text))
    }

    /// The keywords from a position on that continue no statement, those in comments included.
    fn beginning_statements(text: &'a str, from: usize) -> impl Iterator<Item = Self> {
        static KEYWORD: LazyLock<Regex> = LazyLock::new(|| {
            let table_expression = r#"with\s+(?:recursive\s+)?(?:\w+|"[^"]*")\s*(?:\([^)]*\)\s*)?as\b"#;
            let others = "explain|insert|replace|update|delete|create|drop|alter|pragma|attach|detach|begin|vacuum";
            Regex::new(&format!(r"(?i)\b(?:(?:select|values)\b|{table_expression}|(?P<other>{others})\b)"))
                .expect("the pattern is valid")
        });
        let mut next = from;
        let keywords = std::iter::from_fn(move || {
            let captures = KEYWORD.captures_at(text, next)?;
            let (start, end) = (captures.get_match().start(), captures.get_match().end());
            let line = text[..start].rfind('\n').map_or(0, |at| at + 1).max(from);
            let is_query = captures.name("other").is_none();
            next = end;
            Some(Keyword { text: &text[start..end], start, end, is_query, lead: text[line..start].trim() })
        });
        keywords.filter(|keyword| !keyword.continues_statement(text))
    }

    fn is_in_comment(&self, text: &str) -> bool {
        let before = &text[..self.start];
        let is_open = |at: usize| !before[at..].contains("*/") && text[self.start..].contains("*/");
        self.lead.trim_start_matches(';').trim_start().starts_with("--") || before.rfind("/*").is_some_and(is_open)
    }

    fn continues_statement(&self, text: &str) -> bool {
        let before = text[..self.start].trim_end();
        let word = before.rsplit(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        before.ends_with('(') || WORDS_BEFORE_PART.iter().any(|part| word.eq_ignore_ascii_case(part))
    }

    /// Whether at most the mark of a list or of a prompt stands before it.
    fn is_first_of_line(&self) -> bool {
        !self.lead.contains(char::is_alphabetic)
    }

    /// A label's colon, a quotation mark or a tag, but no punctuation within a sentence or a query.
    fn follows_punctuation(&self) -> bool {
        self.lead.ends_with(|c: char| !c.is_alphanumeric() && !matches!(c, ',' | ')' | '-'))
    }

    fn is_capital(&self) -> bool {
        self.text.starts_with(|c: char| c.is_uppercase()) && !is_capitalized(self.text)
    }

    /// The position of what ends a query in quotation marks, asterisks or backticks: as many
    /// backticks as before it (and before the language), or the last other mark on its line.
    fn closing_delimiter(&self, text: &str) -> Option<usize> {
        const MARKS: [(&str, &str); 7] =
            [("**", "**"), ("*", "*"), ("$", "$"), ("\"", "\""), ("'", "'"), ("“", "”"), ("‘", "’")];
        static BACKTICKS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"(`+)\w*$").expect("the pattern is valid"));
        let (before, rest) = text.split_at(self.start);
        let end = match BACKTICKS.captures(self.lead) {
            Some(captures) => find_backticks(rest, captures[1].len()),
            None => {
                if before.ends_with("boxed{") || before.ends_with("text{") {
                    return Some(self.start + rest.find('}')?);
                }
                let (_, closing) = MARKS.iter().find(|(opening, _)| before.ends_with(opening))?;
                rest.lines().next()?.rfind(closing)
            }
        };
        Some(self.start + end?)
    }
}

/// The position of the first run of exactly so many backticks.
fn find_backticks(text: &str, length: usize) -> Option<usize> {
    let mut runs = text.match_indices('`').map(|(at, _)| at).filter(|&at| !text[..at].ends_with('`'));
    runs.find(|&at| text[at..].len() - text[at..].trim_start_matches('`').len() == length)
}

/// Where a statement ends: at its semicolon, or at what no SQL holds.
fn statement_end(text: &str, start: usize) -> usize {
    let mut tokens = tokens(&text[start..]);
    let end = tokens.find(|token| {
        token.kind == Kind::Foreign || [";", "\u{FF1B}", "\u{3002}"].iter().any(|mark| token.is_symbol(mark))
    });
    end.map_or(text.len(), |token| start + token.start)
}

fn paragraph_end(text: &str, start: usize) -> usize {
    static BLANK_LINE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\n[ \t\r]*\n").expect("the pattern is valid"));
    BLANK_LINE.find_at(text, start).map_or(text.len(), |blank| blank.start())
}

/// Where a query in prose may end, the last position first: at the end of its statement, of a line
/// that the next one does not continue, or of a sentence.
fn ends(text: &str, start: usize, end: usize) -> impl Iterator<Item = usize> {
    let keyword = text[start..].split_whitespace().next().unwrap_or_default();
    let statement = &text[start..end];
    let may_end = move |at: usize, mark: &str| {
        let rest = &statement[at + mark.len()..];
        match mark {
            "\n" => !continues_query(rest, keyword) && !is_misspelled_clause(rest, keyword),
            _ => (rest.is_empty() || rest.starts_with(char::is_whitespace)) && !begins_with_capital_clause(rest),
        }
    };
    let marks = statement.match_indices(['\n', '.']).filter(move |&(at, mark)| may_end(at, mark));
    let inner: Vec<usize> = marks.take(MAX_TRIED).map(|(at, _)| start + at).collect();
    std::iter::once(end).chain(inner.into_iter().rev())
}

/// Whether the text continues a query that `keyword` begins. A clause's word with a capital begins a
/// sentence, unless the query writes its words so too.
fn continues_query(text: &str, keyword: &str) -> bool {
    let text = text.trim_start();
    let word = &text[..text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len())];
    let is_clause = CLAUSE_WORDS.iter().any(|clause| word.eq_ignore_ascii_case(clause));
    let is_prose = is_capitalized(word) && !is_capitalized(keyword);
    text.starts_with([',', '=', '<', '>', '+', '/', '|', '%', ')', ';']) || (is_clause && !is_prose)
}

/// Whether a clause in capitals follows, which no sentence begins with.
fn begins_with_capital_clause(text: &str) -> bool {
    let word = text.split_whitespace().next().unwrap_or_default();
    CLAUSE_WORDS.iter().any(|clause| word == clause.to_uppercase())
}

/// Whether the line after a query reads like a clause that SQL does not have: `LIMITT 3`.
fn is_misspelled_clause(text: &str, keyword: &str) -> bool {
    static CAPITALS: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^[ \t]*(?P<word>[A-Z]{3,})[ \t]+[^\s:]").expect("the pattern is valid"));
    static LIMIT: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^[ \t]*[a-z]+ \d+[ \t;]*(?:\n|$)").expect("the pattern is valid"));
    let is_statement = Keyword::find(text, 0).is_some_and(|next| text[..next.start].trim().is_empty());
    let is_clause = CAPITALS.captures(text).is_some_and(|found| !["SQL", "NOTE"].contains(&&found["word"]));
    !is_statement && ((is_clause && !keyword.contains(char::is_lowercase)) || LIMIT.is_match(text))
}

/// Whether the word is written like the first of a sentence.
fn is_capitalized(word: &str) -> bool {
    let mut chars = word.chars();
    chars.next().is_some_and(char::is_uppercase) && chars.next().is_some_and(char::is_lowercase)
}

/// Whether nothing but a semicolon and comments stand between two statements.
fn is_separator(between: &str) -> bool {
    between.contains(';') && tokens(between).all(|token| !token.is_significant() || token.is_symbol(";"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The query of an answer to questions about `pet(name, age)`.
    fn query(answer: &str) -> Option<String> {
        let database = rusqlite::Connection::open_in_memory().unwrap();
        database.execute_batch("CREATE TABLE pet (name, age)").unwrap();
        find_query(answer, |query| database.prepare(query).is_ok())
    }

    #[track_caller]
    fn assert_query(answer: &str, expected: &str) {
        assert_eq!(query(answer).as_deref(), Some(expected), "{answer}");
    }

    const COUNT: &str = "SELECT count(*) FROM pet";

    #[test]
    fn a_query_ends_at_its_semicolon_and_not_at_those_in_strings_and_comments() {
        for query in [
            "SELECT ';' FROM pet",
            "SELECT 'it''s; here' FROM pet",
            "SELECT name AS \"a;b\" FROM pet",
            "SELECT name AS `a;b` FROM pet",
            "SELECT name AS [a;b] FROM pet",
            "SELECT name /* a; b */ FROM pet",
            "SELECT name -- the pet's; name\nFROM pet",
        ] {
            assert_query(query, query);
            assert_query(&format!("{query}; DROP TABLE pet"), query);
            assert_query(&format!("```sql\n{query};\n```"), query);
            assert_query(&format!("Here:\n{query};\nIt's done; really."), query);
        }
    }

    #[test]
    fn comments_before_a_query_are_none_of_it() {
        for comment in ["-- count all; no filter", "-- the shop's pets", "-- SELECT 1;", "/* SELECT 1;\nSELECT 2 */"] {
            assert_query(&format!("{comment}\n{COUNT};\nThat counts them."), COUNT);
            assert_query(&format!("```sql\n{comment}\n{COUNT};\n```"), COUNT);
        }
    }

    #[test]
    fn the_last_fence_that_holds_a_query_counts() {
        for answer in [
            "```sql\nSELECT 1\n```\nCorrection:\n```sql\nSELECT count(*) FROM pet\n```",
            "SELECT 1;\n```\nSELECT count(*) FROM pet\n```\nSELECT 2",
            "```sql\nSELECT count(*) FROM pet\n```\nIt prints:\n```\ncount(*)\n3\n```",
            "```sql\nSELECT count(*) FROM pet;\n```\n```sql\nEXPLAIN QUERY PLAN SELECT 1;\n```",
            "```sql\nSELECT count(*) FROM pet;\n```\n```sql\nexplain select 1;\n```",
            "```sql\nSELECT count(*) FROM pet;\n```\n```python\nrows = run(\"SELECT 1\")\n```",
            "```sql\nSELECT count(*) FROM pet;\n```\n```\n```",
            "~~~~\nSELECT count(*) FROM pet\n~~~~",
            "1. So:\n\n   ```mysql\n   SELECT count(*) FROM pet\n   ```",
            "```sql\nSQL: SELECT count(*) FROM pet\n```",
            "```sql SELECT count(*) FROM pet\n```",
            "```SELECT count(*) FROM pet;\n```",
            "> ```sql\n> SELECT count(*) FROM pet\n> ```\n> It counts.",
            "```sql\nCREATE VIEW v AS SELECT 1;\nSELECT count(*) FROM pet;\nSELECT 2;\n```",
            "```sql\ninsert into pet\nselect 1, 2;\nSELECT count(*) FROM pet```\nThat's it.",
        ] {
            assert_query(answer, COUNT);
        }
        assert_query(
            "```sql\nSELECT count(*) FROM pet\n```\n```sql\nSELECT agee FROM pet\n```",
            "SELECT agee FROM pet",
        );
    }

    #[test]
    fn a_query_in_a_fence_of_another_form_is_found_if_there_is_no_other() {
        for answer in [
            "```json\n{\"sql\": \"SELECT count(*) FROM pet\"}\n```",
            "```json\n{\n  \"thought\": \"Count all.\",\n  \"sql\": \"SELECT count(*) FROM pet;\"\n}\n```\nIt counts.",
            "```\nsqlite> SELECT count(*) FROM pet;\n3\n```",
            "```sql\nmysql> SELECT count(*) FROM pet;\n```",
            "```python\nrows = run(\"SELECT count(*) FROM pet\")\n```",
            "```xml\n<sql>SELECT count(*) FROM pet</sql>\n```",
            "```json\n{\"sql\": \"SELECT 1\"}\n```\nNo:\n```json\n{\"sql\": \"SELECT count(*) FROM pet\"}\n```",
            "```json\n{\"sql\": \"SELECT 1\"}\n```\nThat is: SELECT count(*) FROM pet",
            "```json\n{\"sql\": \"SELECT 1\"}\n```\n```sql\nSELECT count(*) FROM pet\n```\n```\nsqlite> SELECT 2;\n```",
        ] {
            assert_query(answer, COUNT);
        }
        assert_eq!(query("```sql\nEXPLAIN SELECT count(*) FROM pet\n```"), None);
        assert_eq!(query("```json\n{\"sql\": \"SELECT agee FROM pet\"}\n```"), None);
    }

    #[test]
    fn a_query_in_prose_is_what_the_database_accepts() {
        for answer in [
            "SQL: SELECT count(*) FROM pet",
            "**SQL Query:** SELECT count(*) FROM pet;",
            "Answer SELECT count(*) FROM pet.",
            "The query is:\nSELECT count(*) FROM pet\n\nIt counts all rows.",
            "The query is\n\n    SELECT count(*) FROM pet\n\nIn it, all rows count.",
            "With this we count:\nSELECT count(*) FROM pet\n- It counts\n- all rows",
            "Here's the query (it's short): SELECT count(*) FROM pet",
            "You select the rows with `SELECT count(*) FROM pet`, which counts.",
            "Use ```SELECT count(*) FROM pet```",
            "Use ```sql SELECT count(*) FROM pet``` here.",
            "It is \"SELECT count(*) FROM pet\".",
            "It is “SELECT count(*) FROM pet”, in short.",
            "{\"sql\": \"SELECT count(*) FROM pet\"}",
            "{\"sql\": \"SELECT count(*) FROM pet;\"}",
            "<sql>SELECT count(*) FROM pet</sql>",
            "**SELECT count(*) FROM pet**",
            "The SELECT statement is SELECT count(*) FROM pet. It counts.",
            "sqlite> SELECT count(*) FROM pet;\n3",
            "1. SELECT count(*) FROM pet",
            "SELECT 1;\nNo, that is incorrect:\nSELECT count(*) FROM pet;",
            "SELECT 1\n\nCorrection:\n\nSELECT count(*) FROM pet",
            "SELECT count(*) FROM pet;\n\nSelect every pet and count.",
            "    SELECT count(*) FROM pet\n```\n",
            "答案是 SELECT count(*) FROM pet。谢谢",
            "SELECT count(*) FROM pet；",
            "*SELECT count(*) FROM pet*",
            "$SELECT count(*) FROM pet$",
            r"\boxed{SELECT count(*) FROM pet}",
            r"$\boxed{\text{SELECT count(*) FROM pet}}$",
            r#"{"sql": "SELECT count(*)\u0020FROM pet", "tables": ["pet"]}"#,
            "SELECT count(*) FROM pet\nSQL counts them all.",
            "SELECT count(*) FROM pet\nNOTE: it counts all.",
        ] {
            assert_query(answer, COUNT);
        }
        assert_query("sql: select name from pet", "select name from pet");
        assert_query(
            r#"So: {"sql": "SELECT name\nFROM pet WHERE name = \"x\""}"#,
            "SELECT name\nFROM pet WHERE name = \"x\"",
        );
    }

    #[test]
    fn queries_of_several_lines_and_parts_stay_whole() {
        for query in [
            "SELECT name\n\nFROM pet\nWHERE age > 1\n  AND name IN\n(SELECT name FROM pet)",
            "SELECT name FROM pet\nUNION\nSELECT age FROM pet",
            "WITH old AS (SELECT * FROM pet WHERE age > 9) SELECT name FROM old",
            "with recursive n(x) as (select 1 union all select x + 1 from n where x < 5)\nselect x from n",
            "SELECT name FROM pet\n  p",
            "VALUES (1), (2)",
            "Select name\nFrom pet\nWhere age > 1",
        ] {
            assert_query(query, query);
            assert_query(&format!("So:\n{query}\n\nThis is all."), query);
            assert_query(&format!("```\n{query}\n```"), query);
        }
    }

    #[test]
    fn a_broken_query_is_not_cut_until_it_runs() {
        for answer in [
            "",
            "I do not know.",
            "count(*) FROM pet",
            "SELECT name FROM pet\nWHERE agee > 1",
            "SELECT name FROM pet\n, owner",
            "SELECT name FROM pet\nLIMITT 3",
            "select name from pet\nlimitt 3",
            "SELECT name FROM pet. WHERE foo",
            "SELECT name FROM pet UNION SELECT agee FROM pet",
            "SELECT agee FROM pet UNION SELECT name FROM pet",
            "WITH old AS (SELECT agee FROM pet) SELECT name FROM old",
            "SELECT agee FROM pet WHERE name IN (SELECT name FROM pet)",
            "EXPLAIN SELECT name FROM pet",
            "explain query plan select name from pet",
            "INSERT INTO pet SELECT name, age FROM pet",
            "CREATE TABLE x AS\nSELECT name FROM pet",
            "(SELECT name FROM pet)",
        ] {
            assert_eq!(query(answer), None, "{answer}");
        }
    }

    #[test]
    fn an_answer_that_repeats_itself_is_not_asked_about_for_each_pair_of_its_lines() {
        let num_asked = std::cell::Cell::new(0);
        let answer = "VALUES (1), t counts.\n\n".repeat(100);
        let query = find_query(&answer, |_| {
            num_asked.set(num_asked.get() + 1);
            false
        });
        assert!(query.is_none() && num_asked.get() <= 300, "{}", num_asked.get());
    }

    #[test]
    fn a_text_of_many_keywords_is_searched_at_its_end() {
        // No two texts are equal, so each is asked about.
        let lines = |num: usize| (0..num).map(|row| format!("VALUES ({row}), t counts.\n\n")).collect::<String>();
        let num_asked = |answer: &str| {
            let num = std::cell::Cell::new(0);
            assert_eq!(find_query(answer, |_| num.replace(num.get() + 1) == usize::MAX), None);
            num.get()
        };
        assert_eq!(num_asked(&lines(1000)), num_asked(&lines(500)));
        let prose = "VALUES (1), t counts.\n\n".to_owned() + &"It counts.\n".repeat(1000);
        assert!(num_asked(&prose) <= MAX_TRIED + 1);
        assert_query(&format!("{}{COUNT}", lines(500)), COUNT);
    }

    #[test]
    fn of_a_script_the_first_query_counts() {
        for rest in ["SELECT 1", "\nSELECT 1;\n", "-- more\nSELECT 1; SELECT 2;", "DROP TABLE pet", ""] {
            assert_query(&format!("{COUNT};{rest}"), COUNT);
        }
    }
}
