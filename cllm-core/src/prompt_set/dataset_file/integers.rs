//! Keeps the digits of integers that no 64-bit number holds, such as long ids: read as a number,
//! such an integer would be rounded, and two of them could become one.

/// Puts quotes around each of them, so that it becomes text with the digits of the file.
pub(super) fn quote_wide(json: Vec<u8>) -> Vec<u8> {
    let (mut quoted, mut copied, mut position, mut is_text) = (Vec::new(), 0, 0, false);
    while position < json.len() {
        let length = if is_text { 0 } else { number_length(&json[position..]) };
        let number = &json[position..position + length];
        if is_wide_integer(number) {
            quoted.extend_from_slice(&json[copied..position]);
            quoted.extend([b"\"", number, b"\""].concat());
            copied = position + length;
        }
        position += match json[position] {
            _ if length > 0 => length,
            b'\\' if is_text => 2,
            b'"' => {
                is_text = !is_text;
                1
            }
            // No text of JSON goes on after the end of a line, so a broken line costs no other.
            b'\n' => {
                is_text = false;
                1
            }
            _ => 1,
        };
    }
    if quoted.is_empty() {
        return json;
    }
    quoted.extend_from_slice(&json[copied..]);
    quoted
}

fn number_length(json: &[u8]) -> usize {
    let is_part = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
    match json.first() {
        Some(b'-' | b'0'..=b'9') => json.iter().take_while(|byte| is_part(byte)).count(),
        _ => 0,
    }
}

fn is_wide_integer(number: &[u8]) -> bool {
    let digits = number.strip_prefix(b"-").unwrap_or(number);
    // The longest 64-bit integers have 19 digits with a sign and 20 without one.
    if digits.len() < 19 || digits[0] == b'0' || !digits.iter().all(u8::is_ascii_digit) {
        return false;
    }
    std::str::from_utf8(number).is_ok_and(|text| text.parse::<i64>().is_err() && text.parse::<u64>().is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_integers_that_no_64_bit_number_holds_become_text() {
        for (before, after) in [
            (r#"{"id":12345678901234567890123}"#, r#"{"id":"12345678901234567890123"}"#),
            ("[18446744073709551615, 18446744073709551616]", "[18446744073709551615, \"18446744073709551616\"]"),
            ("[-9223372036854775808,-9223372036854775809]", "[-9223372036854775808,\"-9223372036854775809\"]"),
            ("[12345678901234567890.5, 12345678901234567890e3]", "[12345678901234567890.5, 12345678901234567890e3]"),
            (
                r#"["a 123456789012345678901 \" 123456789012345678901"]"#,
                r#"["a 123456789012345678901 \" 123456789012345678901"]"#,
            ),
            ("[\"broken\n[123456789012345678901]", "[\"broken\n[\"123456789012345678901\"]"),
            ("[0123456789012345678901, 7]", "[0123456789012345678901, 7]"),
            ("\"\\", "\"\\"),
        ] {
            assert_eq!(String::from_utf8(quote_wide(before.as_bytes().to_vec())).unwrap(), after);
        }
    }
}
