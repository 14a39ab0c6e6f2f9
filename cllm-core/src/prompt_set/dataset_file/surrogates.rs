//! Repairs escapes in JSON that stand for half of a character, such as `\ud83d` where a text was
//! cut inside an emoji. Python writes them, but no UTF-8 text can hold them, and one would make a
//! whole file unreadable.

/// Replaces each such escape with that of U+FFFD, which has the same length. Returns the numbers
/// of the lines that have one, from 1 and ascending.
pub(super) fn replace_lone(json: &mut [u8]) -> Vec<usize> {
    let (mut lines, mut line, mut position) = (Vec::new(), 1, 0);
    while position < json.len() {
        let step = match json[position] {
            b'\n' => {
                line += 1;
                1
            }
            b'\\' => match (escaped_unit(&json[position..]), escaped_unit(json.get(position + 6..).unwrap_or(&[]))) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
                (Some(0xd800..=0xdfff), _) => {
                    json[position + 2..position + 6].copy_from_slice(b"fffd");
                    if lines.last() != Some(&line) {
                        lines.push(line);
                    }
                    6
                }
                _ => 2,
            },
            _ => 1,
        };
        position += step;
    }
    lines
}

/// The UTF-16 code unit of the escape with which `json` begins, if it begins with one.
fn escaped_unit(json: &[u8]) -> Option<u16> {
    let digits = json.strip_prefix(b"\\u")?.get(..4)?;
    digits.iter().try_fold(0, |unit, &digit| Some(unit * 16 + char::from(digit).to_digit(16)? as u16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_replaced_and_pairs_and_escaped_backslashes_stay() {
        for (before, after, lines) in [
            (r#""a \ud83d b""#, r#""a \ufffd b""#, &[1][..]),
            (r#""\ud83d\ude00 \uD83D\uDE00""#, r#""\ud83d\ude00 \uD83D\uDE00""#, &[]),
            (r#""\ude00\ud83d""#, r#""\ufffd\ufffd""#, &[1]),
            (r#""\ud83d\ud83d\ude00""#, r#""\ufffd\ud83d\ude00""#, &[1]),
            (r#""\\ud83d \\\ud83d \ud8""#, r#""\\ud83d \\\ufffd \ud8""#, &[1]),
            ("1\n\"\\ud83d\"\n2\n\"\\udc00\\udc00\"\n", "1\n\"\\ufffd\"\n2\n\"\\ufffd\\ufffd\"\n", &[2, 4]),
            ("\"\\", "\"\\", &[]),
        ] {
            let mut json = before.as_bytes().to_vec();
            assert_eq!(replace_lone(&mut json), lines, "{before}");
            assert_eq!(String::from_utf8(json).unwrap(), after);
        }
    }
}
