"""Chat templates: the text and the ids of conversations, and which of them are answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_cases import KINDS, MARKED, RESERVED, SPEECH, pieces

from transnormer.data.chat_template import PLAIN, TEMPLATES, ChatTemplate, template_for
from transnormer.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer."""
    return KINDS[request.param]()


def test_the_released_template_is_the_prompt_of_the_released_script() -> None:
    template = ChatTemplate(TEMPLATES["released"], ByteTokenizer())
    text = "<s>be  kind.\nHuman:\nthe model reads?\nAssistant:\n"
    assert template.render(SPEECH[:2]) == text
    first = text + "what the text is, 12345</s>"
    assert template.render(SPEECH[:3], add_generation_prompt=False) == first
    assert template.render(SPEECH[1:2]) == "<s>Human:\nthe model reads?\nAssistant:\n"


def test_the_reserved_template_writes_the_reserved_tokens() -> None:
    tokenizer = pieces(add_dummy_prefix=False)
    template = ChatTemplate(TEMPLATES["reserved"], tokenizer)
    user, assistant = (tokenizer.encode(name)[0] for name in RESERVED)
    ids = template.encode(SPEECH[1:2])
    assert (ids[0], ids[1], ids[-1]) == (tokenizer.bos_id, user, assistant)
    assert tokenizer.decode(ids[2:-1]) == SPEECH[1]["content"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools is none and documents is none }}",
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages[0] | tojson(ensure_ascii=true, indent=2) }}",
    ],
)
def test_a_template_has_the_names_of_transformers(source: str) -> None:
    found = ChatTemplate(source, ByteTokenizer()).render([{"role": "user", "content": "線"}])
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template(
        conversations=[[{"role": "user", "content": "線"}]], chat_template=source
    )
    assert found == theirs[0][0]


def test_names_of_tokens_in_a_message_stay_text(tokenizer: Tokenizer) -> None:
    names = [*tokenizer.special_tokens, *tokenizer.markers]
    assert "</s>" in names
    content = " ".join(f"a{name}{name} b" for name in names)
    template = ChatTemplate(TEMPLATES["released"], tokenizer)
    ids = template.encode([{"role": "user", "content": content}])
    control = {*tokenizer.special_tokens.values(), *map(tokenizer_id(tokenizer), tokenizer.markers)}
    assert [i for i in ids if i in control] == [tokenizer.bos_id]
    assert tokenizer.decode(ids[1:]) == f"Human:\n{content}\nAssistant:\n"


def tokenizer_id(tokenizer: Tokenizer) -> Callable[[str], int]:
    """The id of a marker."""
    return lambda name: tokenizer.encode_inside(name)[0]


def test_answers_are_the_assistants_words_and_their_end(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["released"], tokenizer)
    ids, answers = template.encode_answers(SPEECH)
    told = [i for i, is_answer in zip(ids, answers, strict=True) if is_answer]
    first, second = (
        [*tokenizer.encode_inside(SPEECH[place]["content"]), tokenizer.eos_id] for place in (2, 4)
    )
    assert told == first + second
    start = ids.index(tokenizer.eos_id) + 1
    assert ids[: start - len(first)] == template.encode(SPEECH[:2])


def test_what_follows_the_end_of_text_is_no_answer() -> None:
    tokenizer = ByteTokenizer()
    ids, answers = ChatTemplate(MARKED, tokenizer).encode_answers(SPEECH)
    assert ids[-1] == ord("\n")
    assert not answers[-1]
    assert answers[-2]
    assert ids[-2] == tokenizer.eos_id


def test_further_messages_continue_a_conversation(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(TEMPLATES["released"], tokenizer)
    whole = template.encode_answers(SPEECH).ids
    begin = template.encode(SPEECH[:2])
    answer = tokenizer.encode_inside(SPEECH[2]["content"])
    last = [*tokenizer.encode_inside(SPEECH[4]["content"]), tokenizer.eos_id]
    assert [*begin, *answer, *template.follow(SPEECH[3:4]), *last] == whole


def test_the_template_is_kept_beside_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = tokenizer.fingerprint
    tokenizer.chat_template = MARKED
    tokenizer.save(tmp_path)
    tokenizer.chat_template = None
    found = load_tokenizer(tmp_path)
    assert (found.chat_template, found.fingerprint) == (MARKED, before)
    assert template_for(found, "plain").source == MARKED
    assert template_for(tokenizer, "plain").source == PLAIN


def test_a_template_in_the_tokenizers_table_is_found(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "the chat template is not a chat template"),
        ("{{ raise_exception('no system') }}", "messages do not fit the chat template: no system"),
        ("{{ messages[0].content + 1 }}", "messages do not fit the chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "messages do not fit"),
        (PLAIN, "ends an answer without the end-of-text token"),
        ("{{ messages[-1].content + eos_token }}", r"writes messages\[1\] otherwise"),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}",
            r"begins messages\[1\] otherwise than the answer that it asks for",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, ByteTokenizer()).encode_answers(SPEECH[1:])
