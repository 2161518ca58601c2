"""What a user is told: mistakes in one sentence, and never a credential in it."""

import contextlib
import re

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled


class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong and the way out. Scripts print it and exit with code 2.

    A library names a parameter in backquotes, `max_skip_ratio`; a script prints it as the flag of that name.
    on_one_rank: whether it may have happened to this process alone, which then has to say so itself.
    """

    def __init__(self, sentence, on_one_rank=False):
        super().__init__(sentence)
        self.on_one_rank = on_one_rank


@contextlib.contextmanager
def blame(what, *library_errors, way_out=""):
    """What libraries raise inside becomes a UserError: what is wrong, their first line, and the way out."""
    try:
        yield
    except library_errors as error:
        raise UserError(f"{what} ({line_of(error)}){way_out and '; ' + way_out}") from error


@contextlib.contextmanager
def speaking_of(flag, parameter="train_shards_path_or_url"):
    """A UserError inside that names the library's `parameter` names `flag`, which gives it in this program."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"`{parameter}`", flag), error.on_one_rank) from error


SECRET = r"[\w-]*(?:token|sig|key|secret|credential|passw|auth|jwt|hmac)[\w-]*"  # names of parameters
# Other parameters of a signed query; they change with each signature, and without one they mean something else.
SIGNED = (
    r"(?:x-(?:amz|goog|ms|oss|obs|tos|bce)-|q-)[\w-]+|(?:aws|google|oss)?access(?:key)?id|policy|expir(?:es|y|ation)|"
    r"exp|md5|ts|timestamp|e|s[vsrtpe]|srt|sip|spr|skoid|sktid|skt|ske|sks|skv|sdd|saoid|suoid|scid|ses"
)
TAR = r"[^&\s\"']*\.(?:tar|tgz|gz|bz2|xz)(?![^&\s\"'])"  # a value that names one is no secret


def mask_credentials(text):
    """An address or command without its credentials, which become ***.

    User and password, signed queries, headers, and the flags, variables and tokens of commands.
    """
    text = re.sub(r"(://)[^/@\s\"']+@", r"\1***@", text)
    text = re.sub(rf"(?i)([?&]{SECRET}=)(?!{TAR})[^&\s\"']+", r"\1***", text)
    text = re.sub(r"(?i)\b(bearer|basic|authorization: *token)((?:\\?\s)+)[^\s\"']+", r"\1\2***", text)
    header = r"(?:-H|--header)[ =]?[\"']?(?:(?:proxy-)?authorization|cookie|[\w-]*(?:token|api-?key|secret)): *"
    text = re.sub(rf"(?i)({header})(?!(?:bearer|basic|token)\b)[^\"'\s][^\"']*", r"\1***", text)
    text = re.sub(r"(?i)(\s--[\w-]*(?:password|token|secret)[\w-]*[= ])[^\s\"'$]+", r"\1***", text)
    text = re.sub(r"(\s(?:-u|--user|--proxy-user)[= ]?[\"']?)[^\s\"':$]+:[^\s\"']+", r"\1***", text)
    text = re.sub(r"\b([A-Z_]*(?:TOKEN|SECRET|PASSW|KEY)[A-Z_]*=[\"']?)[^\s\"'$]+", r"\1***", text)
    return re.sub(r"\b(hf_|ghp_|github_pat_|glpat-)\w{16,}", r"\1***", text)


def without_credentials(text):
    """What an address or command reads, whoever asks and until whenever: equal for two signatures of one file.

    Also equal for the text that `mask_credentials` makes of it.
    """
    text = re.sub(r"(://)[^/@\s\"']+@", r"\1", text)
    return mask_credentials(re.sub(r"\?[^\s\"'#]*", lambda query: _unsigned(query[0]), text))


def _unsigned(query):
    """A query `?a=b&c=d` without its signature, where it has one."""
    parts = query[1:].split("&")
    signature = [part for part in parts if re.match(rf"(?i){SECRET}=(?!{TAR})", part)]
    if not signature:
        return query
    kept = [part for part in parts if part not in signature and not re.match(rf"(?i)(?:{SIGNED})=", part)]
    return "?" + "&".join(kept) if kept else ""


UNREACHED = {  # by what the hub's client raised: diffusers calls all of it a file that the repository lacks
    OfflineModeIsEnabled: "it is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it",
    LocalEntryNotFoundError: "the hub cannot be reached, and it is not in its cache, which `hf download` fills",
    HFValidationError: "no such folder, and a name on the hub reads owner/name",
}


def line_of(error):
    """The first line of what a library says; of the hub, whether it was asked at all."""
    kinds, cause = set(), isinstance(error, OSError) and error
    while cause:
        kinds.add(type(cause))
        cause = cause.__cause__ or cause.__context__
    unreached = (sentence for kind, sentence in UNREACHED.items() if kind in kinds)
    return next(unreached, str(error).strip().split("\n")[0])


def first_line(error):
    """An exception in one line."""
    return line_of(error) if isinstance(error, UserError) else f"{type(error).__name__}: {line_of(error)[:300]}"


# What libraries raise for arguments that they do not take.
CALL_ERRORS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError)
