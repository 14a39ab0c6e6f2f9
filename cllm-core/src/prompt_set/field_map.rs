//! The names that a user gives to the fields of a file whose own names are not known here.

use std::str::FromStr;

/// What a field of a row can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Id,
    Source,
    /// Text that is continued as it is, or messages.
    Prompt,
    /// Text that becomes the question of a conversation.
    Question,
    /// A conversation, whose last turn may be the reference.
    Messages,
    Reference,
}

impl Role {
    const ALL: [(&'static str, Role); 6] = [
        ("prompt", Role::Prompt),
        ("question", Role::Question),
        ("messages", Role::Messages),
        ("reference", Role::Reference),
        ("id", Role::Id),
        ("source", Role::Source),
    ];

    /// Whether the field holds the prompt, in one of its forms.
    pub(super) fn is_prompt(self) -> bool {
        matches!(self, Role::Prompt | Role::Question | Role::Messages)
    }
}

/// Which fields of a file hold the prompt, the reference and so on, if they do not have the names
/// that are known here. Written as `prompt=FIELD,reference=FIELD`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldMap(Vec<(Role, String)>);

impl FieldMap {
    /// The field that the user named for a role.
    pub(super) fn get(&self, role: Role) -> Option<&str> {
        self.0.iter().find(|(mapped, _)| *mapped == role).map(|(_, field)| field.as_str())
    }

    /// The form of the prompt and its field, if the user named one.
    pub(super) fn prompt(&self) -> Option<(Role, &str)> {
        self.0.iter().find(|(role, _)| role.is_prompt()).map(|(role, field)| (*role, field.as_str()))
    }
}

impl FromStr for FieldMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut map = FieldMap::default();
        for pair in text.split(',') {
            let parsed = pair.split_once('=').and_then(|(name, field)| {
                let role = Role::ALL.into_iter().find(|(known, _)| *known == name.trim())?.1;
                Some((role, field.trim())).filter(|(_, field)| !field.is_empty())
            });
            let Some((role, field)) = parsed else {
                let names = Role::ALL.map(|(name, _)| name).join(", ");
                return Err(format!("`{pair}` is not NAME=FIELD with one of the names {names}"));
            };
            if map.get(role).is_some() || (role.is_prompt() && map.prompt().is_some()) {
                return Err(format!(
                    "`{pair}` names a second field: name one of each, and one prompt, question or messages"
                ));
            }
            map.0.push((role, field.to_owned()));
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_names_one_field_for_each_role() {
        let map: FieldMap = "question=query, reference=solution".parse().unwrap();
        assert_eq!(map.prompt(), Some((Role::Question, "query")));
        assert_eq!((map.get(Role::Reference), map.get(Role::Id)), (Some("solution"), None));
        for bad in ["", "prompt", "prompt=", "answer=x", "prompt=a,prompt=b", "prompt=a,messages=b", "id=a,id=b"] {
            assert!(bad.parse::<FieldMap>().is_err(), "{bad}");
        }
    }
}
