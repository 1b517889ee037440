//! Replies of redis (RESP2), and requests that bring the same replies about.

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Status(Vec<u8>),
    /// `-ERR ...`
    Error(Vec<u8>),
    /// `:7`
    Integer(i64),
    /// `$3`, or `$-1` for none.
    Bulk(Option<Vec<u8>>),
}

/// Up to here integers pass through Lua, whose numbers are doubles.
const EXACT: i64 = 1 << 53;

impl Reply {
    /// All replies in `text`, which must be whole and of the kinds above; otherwise why that is not so.
    pub fn parse(mut text: &[u8]) -> Result<Vec<Self>, &'static str> {
        const PART: &str = "a reply was read or sent in part";
        let mut replies = Vec::new();
        while let Some((&kind, rest)) = text.split_first() {
            let end = rest.windows(2).position(|two| two == b"\r\n").ok_or(PART)?;
            let (line, after) = (&rest[..end], &rest[end + 2..]);
            let number = || std::str::from_utf8(line).ok()?.parse::<i64>().ok();
            text = after;
            replies.push(match kind {
                b'+' => Self::Status(line.to_vec()),
                b'-' => Self::Error(line.to_vec()),
                b':' => match number().filter(|n| (-EXACT..=EXACT).contains(n)) {
                    Some(number) => Self::Integer(number),
                    None => return Err("a number is too large"),
                },
                b'$' => match number().ok_or(PART)? {
                    -1 => Self::Bulk(None),
                    length => {
                        let length = usize::try_from(length).map_err(|_| PART)?;
                        let bulk = after.get(..length).ok_or(PART)?;
                        text = after.get(length..).and_then(|rest| rest.strip_prefix(b"\r\n")).ok_or(PART)?;
                        Self::Bulk(Some(bulk.to_vec()))
                    }
                },
                b'*' => return Err("an array is among the unread replies"),
                _ => return Err(PART),
            });
        }
        Ok(replies)
    }

    /// A request that the server answers with this reply.
    pub fn request(&self) -> Vec<u8> {
        let number;
        let (script, argument): (&str, &[u8]) = match self {
            Self::Status(text) => ("return {ok=ARGV[1]}", text),
            Self::Error(text) => ("return {err=ARGV[1]}", text),
            Self::Bulk(Some(bytes)) => ("return ARGV[1]", bytes),
            Self::Bulk(None) => ("return false", b""),
            Self::Integer(value) => {
                number = value.to_string();
                ("return tonumber(ARGV[1])", number.as_bytes())
            }
        };
        let mut request = b"*4\r\n".to_vec();
        let words: [&[u8]; 4] = [b"EVAL", script.as_bytes(), b"0", argument];
        for word in words {
            request.extend(format!("${}\r\n", word.len()).bytes());
            request.extend(word);
            request.extend(b"\r\n");
        }
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_parsed() {
        let text = b"+OK\r\n:-12\r\n$5\r\na\r\nbc\r\n$-1\r\n-ERR no\r\n$0\r\n\r\n";
        let expected = [
            Reply::Status(b"OK".to_vec()),
            Reply::Integer(-12),
            Reply::Bulk(Some(b"a\r\nbc".to_vec())),
            Reply::Bulk(None),
            Reply::Error(b"ERR no".to_vec()),
            Reply::Bulk(Some(Vec::new())),
        ];
        assert_eq!(Reply::parse(text).unwrap(), expected);
        for part in 1..text.len() {
            if Reply::parse(&text[..part]).is_ok() {
                assert!(text[..part].ends_with(b"\r\n"));
            }
        }
        for bad in [&b"*1\r\n:1\r\n"[..], b":9007199254740993\r\n", b"$3\r\nabcd\r\n", b"$-7\r\n", b"bc\r\n"]
        {
            assert!(Reply::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn requests_are_arrays_of_bulk_strings() {
        let request = Reply::Integer(7).request();
        assert_eq!(request, b"*4\r\n$4\r\nEVAL\r\n$24\r\nreturn tonumber(ARGV[1])\r\n$1\r\n0\r\n$1\r\n7\r\n");
    }
}
