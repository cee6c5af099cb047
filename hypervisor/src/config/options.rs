//! Device options as text, `key=value,key=value`, read into the same types as a configuration file's.
//!
//! The text becomes a JSON object whose values are strings (lists, for keys given more than once); the types' own
//! deserializers take strings as well as numbers and booleans. A key that does not exist is refused, with the nearest one that does.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, DeserializeOwned, Deserializer, Visitor};
use serde_json::{Map, Value};

use super::ConfigError;

/// Reads `text` into a `T`. A first word without `=` is the value of `first`, where there is such a key.
///
/// # Errors
/// [`ConfigError::Option`], with the option's name in front.
pub fn parse<T: DeserializeOwned>(option: &'static str, first: Option<&str>, text: &str) -> Result<T, ConfigError> {
    let error = |why: String| ConfigError::Option(option, text.to_owned(), why);
    let mut map = Map::new();
    for (n, part) in text.split(',').enumerate().filter(|(_, part)| !part.is_empty()) {
        let (key, value) = match (part.split_once('='), first) {
            (Some(pair), _) => pair,
            (None, Some(first)) if n == 0 => (first, part),
            (None, _) => return Err(error(format!("\"{part}\" has no value; write {part}=..."))),
        };
        let value = Value::String(value.to_owned());
        match map.get_mut(key) {
            None => {
                map.insert(key.to_owned(), value);
            }
            Some(Value::Array(all)) => all.push(value),
            Some(one) => *one = Value::Array(vec![one.take(), value]),
        }
    }
    T::deserialize(Value::Object(map)).map_err(|e| error(explain(&e.to_string())))
}

/// Makes a deserializer's message a sentence for people; names the nearest key for one that does not exist.
pub fn explain(message: &str) -> String {
    let (message, place) = message.split_once(" at line").map_or((message, ""), |(m, _)| (m, ""));
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if let (Some(rest), [unknown, known @ ..]) = (message.strip_prefix("unknown "), names.as_slice()) {
        let what = if rest.starts_with("variant") { "choice" } else { "key" };
        let nearest = known.iter().min_by_key(|k| distance(unknown, k));
        let advice = match nearest {
            Some(k) if distance(unknown, k) <= 1 + unknown.len() / 3 => format!("did you mean \"{k}\"?"),
            Some(_) => format!("there are {}", known.join(", ")),
            None => "there are none".to_owned(),
        };
        return format!("there is no {what} \"{unknown}\"; {advice}");
    }
    if let (true, [missing]) = (message.starts_with("missing field"), names.as_slice()) {
        return format!("\"{missing}\" is missing; write {missing}=...");
    }
    format!("{}{place}", message.replace('`', "\""))
}

/// Edits that make one word the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let edited = diagonal + usize::from(x != *y);
            let best = edited.min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

/// For `deserialize_with`: true, false, or the words on and off.
///
/// # Errors
/// For anything else.
pub fn flag<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    struct V;
    impl Visitor<'_> for V {
        type Value = bool;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("on or off")
        }
        fn visit_bool<E: de::Error>(self, v: bool) -> Result<bool, E> {
            Ok(v)
        }
        fn visit_str<E: de::Error>(self, v: &str) -> Result<bool, E> {
            match v {
                "on" | "true" => Ok(true),
                "off" | "false" => Ok(false),
                _ => Err(E::invalid_value(de::Unexpected::Str(v), &self)),
            }
        }
    }
    d.deserialize_any(V)
}

/// For `deserialize_with`: a whole number, as such or as text.
///
/// # Errors
/// For anything else.
pub fn number<'de, D: Deserializer<'de>, T: TryFrom<u64> + FromStr>(d: D) -> Result<T, D::Error> {
    struct V<T>(std::marker::PhantomData<T>);
    impl<T: TryFrom<u64> + FromStr> Visitor<'_> for V<T> {
        type Value = T;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a whole number that fits into {} bits", 8 * size_of::<T>())
        }
        fn visit_u64<E: de::Error>(self, v: u64) -> Result<T, E> {
            T::try_from(v).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(v), &self))
        }
        fn visit_i64<E: de::Error>(self, v: i64) -> Result<T, E> {
            let n = u64::try_from(v).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))?;
            self.visit_u64(n)
        }
        fn visit_str<E: de::Error>(self, v: &str) -> Result<T, E> {
            v.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(v), &self))
        }
    }
    d.deserialize_any(V(std::marker::PhantomData))
}

/// For `deserialize_with`: a size as on the command line (`512M`), or a number of bytes.
///
/// # Errors
/// For anything else.
pub fn size<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    struct V;
    impl Visitor<'_> for V {
        type Value = u64;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size such as 512M")
        }
        fn visit_u64<E: de::Error>(self, v: u64) -> Result<u64, E> {
            self.visit_str(&v.to_string())
        }
        fn visit_i64<E: de::Error>(self, v: i64) -> Result<u64, E> {
            self.visit_str(&v.to_string())
        }
        fn visit_str<E: de::Error>(self, v: &str) -> Result<u64, E> {
            super::parse_size(v).map_err(E::custom)
        }
    }
    d.deserialize_any(V)
}

/// For `deserialize_with`: [`size`], where it may be left out.
///
/// # Errors
/// As [`size`].
pub fn optional_size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    size(d).map(Some)
}

/// For `deserialize_with`: one text or a list of them.
///
/// # Errors
/// For anything else.
pub fn texts<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    struct V;
    impl<'de> Visitor<'de> for V {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("text or a list of texts")
        }
        fn visit_str<E: de::Error>(self, v: &str) -> Result<Self::Value, E> {
            Ok(vec![v.to_owned()])
        }
        fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(text) = seq.next_element()? {
                all.push(text);
            }
            Ok(all)
        }
    }
    d.deserialize_any(V)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        path: String,
        #[serde(default, deserialize_with = "flag")]
        readonly: bool,
        #[serde(default, deserialize_with = "number")]
        queues: u8,
        #[serde(default, deserialize_with = "texts")]
        forward: Vec<String>,
        #[serde(default, deserialize_with = "optional_size")]
        size: Option<u64>,
    }

    #[test]
    fn text_becomes_values() {
        let s: Sample = parse("--x", None, "path=/a=b,readonly=on,queues=3,forward=1,forward=2,size=3M").unwrap();
        let forward = vec!["1".to_owned(), "2".to_owned()];
        assert_eq!(s, Sample { path: "/a=b".into(), readonly: true, queues: 3, forward, size: Some(3 << 20) });
        let s: Sample = parse("--x", Some("path"), "/a,forward=1").unwrap();
        assert_eq!((s.path.as_str(), s.forward.len(), s.size), ("/a", 1, None));
    }

    #[test]
    fn mistakes_are_named_with_what_is_right() {
        let why = |text: &str| parse::<Sample>("--x", None, text).unwrap_err().to_string();
        assert!(why("path=a,readnly=on").contains("no key \"readnly\"; did you mean \"readonly\"?"));
        assert!(why("path=a,zzzzz=on").contains("there are path, readonly"));
        assert!(why("readonly=on").contains("\"path\" is missing"));
        assert!(why("path=a,readonly").contains("readonly=..."));
        assert!(why("path=a,readonly=maybe").contains("on or off"));
        assert!(why("path=a,queues=256").contains("whole number"));
        assert!(why("path=a,size=1.5G").contains("no memory size"));
        assert!(why("path=a,path=b").contains("--x"));
    }
}
