//! One question in the form a chat model was trained on.
//!
//! Chat templates are Jinja programs; instead of running a program from a checkpoint, this
//! recognises the handful of forms that they write.

/// A question wrapped for the model, and the texts that end its answer.
#[derive(Debug, PartialEq)]
pub struct Wrapped {
    /// The prompt, without the begin mark (the tokenizer adds it).
    pub prompt: String,
    /// Marks that end the answer.
    pub stops: Vec<&'static str>,
}

struct Form {
    /// What a template of this form contains.
    sign: &'static str,
    before: &'static str,
    after: &'static str,
    stops: &'static [&'static str],
}

const FORMS: &[Form] = &[
    Form {
        sign: "<|start_header_id|>",
        before: "<|start_header_id|>user<|end_header_id|>\n\n",
        after: "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stops: &["<|eot_id|>"],
    },
    Form {
        sign: "<|im_start|>",
        before: "<|im_start|>user\n",
        after: "<|im_end|>\n<|im_start|>assistant\n",
        stops: &["<|im_end|>"],
    },
    Form {
        sign: "<start_of_turn>",
        before: "<start_of_turn>user\n",
        after: "<end_of_turn>\n<start_of_turn>model\n",
        stops: &["<end_of_turn>"],
    },
    Form {
        sign: "<|end|>",
        before: "<|user|>",
        after: "<|end|><|assistant|>",
        stops: &["<|end|>"],
    },
    Form {
        sign: "<|user|>",
        before: "<|user|>\n",
        after: "</s>\n<|assistant|>\n",
        stops: &["</s>"],
    },
    Form { sign: "[INST]", before: "[INST] ", after: " [/INST]", stops: &["</s>"] },
];

/// Wraps a question in the form of `template`.
///
/// # Errors
/// When the model has no template, or one of an unknown form.
pub fn wrap(template: Option<&str>, question: &str) -> Result<Wrapped, String> {
    let Some(template) = template else {
        return Err("the tokenizer has no chat template, so --chat cannot wrap the prompt; leave \
                    --chat out"
            .into());
    };
    // The role is often written by a variable: `<|{{ message['role'] }}|>`.
    let roles_by_variable = template.contains("<|{{") || template.contains("'<|' +");
    let form = FORMS
        .iter()
        .find(|form| template.contains(form.sign))
        .or_else(|| FORMS.iter().find(|form| roles_by_variable && form.sign == "<|user|>"));
    match form {
        Some(form) => Ok(Wrapped {
            prompt: format!("{}{question}{}", form.before, form.after),
            stops: form.stops.to_vec(),
        }),
        None => Err("the tokenizer's chat template is of an unknown form; write the whole prompt \
                     with --prompt and leave --chat out"
            .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_forms_are_recognised() {
        let almanac =
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}";
        let wrapped = wrap(Some(almanac), "Who?").unwrap();
        assert_eq!(wrapped.prompt, "<|user|>Who?<|end|><|assistant|>");
        assert_eq!(wrapped.stops, ["<|end|>"]);
        let chatml = "{{'<|im_start|>' + message['role'] + '\n'}}";
        assert!(wrap(Some(chatml), "q").unwrap().prompt.ends_with("<|im_start|>assistant\n"));
        assert!(wrap(None, "q").is_err());
        assert!(wrap(Some("{{ x }}"), "q").is_err());
    }
}
