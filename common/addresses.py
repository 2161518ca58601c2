"""Addresses and commands of data: without the credentials that they carry, and as a web server wants them."""

import re
import urllib.parse

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


def quote_address(url):
    """An http address with its blanks, umlauts and the like percent-encoded; what is encoded already stays."""
    parts = urllib.parse.urlsplit(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url.strip()))
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        host = host.encode("idna").decode()
    quoted = {name: urllib.parse.quote(getattr(parts, name), "/%:?@!$&'()*+,;=~[]") for name in ("path", "query")}
    return parts._replace(netloc=user + at + host, **quoted).geturl()
