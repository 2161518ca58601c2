"""Addresses and commands: what is written down of them, what tells two apart, and what a server is asked for."""

from common.data import shards
from common.errors import mask_credentials, without_credentials

import pytest

AZURE = "https://h.blob.core.windows.net/c/0.tar?sv=2023-01-03&{}&sr=c&sp=rl&sig={}"
AMAZON = (
    "https://b.s3.amazonaws.com/0.tar?X-Amz-Algorithm=AWS4&X-Amz-Credential={0}&X-Amz-Date={1}&X-Amz-Signature={0}"
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (AMAZON.format("AAAS3CRET", 1), AMAZON.format("BBBS3CRET", 2)),
        (AMAZON.format("AAAS3CRET", 1) + "&X-Amz-Security-Token=AAAS3CRET", AMAZON.format("BBBS3CRET", 2)),
        (AZURE.format("se=2024-01-01", "AAAS3CRET"), AZURE.format("st=2023-12-31&se=2025-01-01", "BBBS3CRET")),
        ("https://h/{0..3}.tar?Expires=1&AWSAccessKeyId=A&Signature=AAAS3CRET", "https://h/{0..3}.tar"),
        ("https://h/0.tar?GoogleAccessId=a&Expires=1&Signature=AAAS3CRET", "https://h/0.tar?Signature=BBBS3CRET"),
        ("https://h/0.tar?Policy=a&Signature=AAAS3CRET&Key-Pair-Id=K", "https://h/0.tar?Signature=BBBS3CRET"),
        ("https://h/0.tar?md5=1&expires=9&token=AAAS3CRET", "https://h/0.tar?token=BBBS3CRET&expires=10"),
        ("https://me:AAAS3CRET@h/0.tar", "https://you:BBBS3CRET@h/0.tar"),
        ("s3://key:AAAS3CRET@b/0.tar", "s3://b/0.tar"),
        ("pipe:curl -H 'Authorization: Bearer AAAS3CRET' h", "pipe:curl -H 'Authorization: Bearer BBBS3CRET' h"),
        ("pipe:curl -H Authorization:\\ Bearer\\ AAAS3CRET h", "pipe:curl -H Authorization:\\ Bearer\\ BBBS3CRET h"),
        ("pipe:curl -H 'Authorization: AAAS3CRET x' h", "pipe:curl -H 'Authorization: BBBS3CRET' h"),
        ('pipe:curl --header="X-Api-Key: AAAS3CRET" h', 'pipe:curl --header="X-Api-Key: BBBS3CRET" h'),
        ("pipe:curl -H 'Cookie: a=AAAS3CRET; b=c' h", "pipe:curl -H 'Cookie: a=BBBS3CRET; b=d' h"),
        ("pipe:curl -u me:AAAS3CRET h", "pipe:curl -u you:BBBS3CRET h"),
        ("pipe:wget --user=me --password=AAAS3CRET h", "pipe:wget --user=me --password=BBBS3CRET h"),
        ("pipe:HF_TOKEN=AAAS3CRET hf download x", "pipe:HF_TOKEN=BBBS3CRET hf download x"),
        ("pipe:AWS_SECRET_ACCESS_KEY='AAAS3CRET' aws s3 cp", "pipe:AWS_SECRET_ACCESS_KEY='BBBS3CRET' aws s3 cp"),
        (f"pipe:get hf_{'A' * 20}S3CRET 0.tar", f"pipe:get hf_{'B' * 20}S3CRET 0.tar"),
        ("pipe:curl 'https://h/0.tar?a=b&sig=AAAS3CRET' | x", "pipe:curl 'https://h/0.tar?a=b&sig=BBBS3CRET' | x"),
    ],
)
def test_a_renewed_signature_is_the_same_address(one, other):
    assert without_credentials(one) == without_credentials(other)
    for text in (one, other):  # what an older checkpoint holds is masked
        masked = mask_credentials(text)
        assert "S3CRET" not in masked and mask_credentials(masked) == masked
        assert without_credentials(masked) == without_credentials(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://h/0.tar?sig=A", "https://h/1.tar?sig=A"),
        ("https://h/get?file=0.tar&sig=A", "https://h/get?file=1.tar&sig=A"),
        ("https://h/get?key=0.tar", "https://h/get?key=1.tar"),
        ("https://h/0.tar?versionId=1&X-Amz-Signature=A", "https://h/0.tar?versionId=2&X-Amz-Signature=A"),
        ("https://h/0.tar?e=1&sp=2", "https://h/0.tar?e=2&sp=2"),
        ("https://me:a@h/0.tar", "https://me:a@g/0.tar"),
        (
            "pipe:curl -H 'Authorization: Bearer A' https://h/0.tar",
            "pipe:curl -H 'Authorization: Bearer A' https://h/1",
        ),
        ("pipe:curl -u me:A https://h/0.tar", "pipe:curl -u me:A https://h/1.tar"),
        ("pipe:python -u a.py", "pipe:python -u b.py"),
        ("pipe:TOKEN=A cat 0.tar", "pipe:TOKEN=A cat 1.tar"),
        ("pipe:cat $TOKENS/0.tar", "pipe:cat $TOKENS/1.tar"),
    ],
)
def test_another_file_is_another_address(one, other):
    assert without_credentials(one) != without_credentials(other)


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("http://h:8/my shards/ü{0}.tar?a=b c&d=%20", "http://h:8/my%20shards/%C3%BC%7B0%7D.tar?a=b%20c&d=%20"),
        ("http://h/a%20b%C3%BC+c/100%.tar", "http://h/a%20b%C3%BC+c/100%25.tar"),
        ("http://h/0.tar?X-Amz-Credential=A%2Fb/c~d_e-f&x=(1)", "http://h/0.tar?X-Amz-Credential=A%2Fb/c~d_e-f&x=(1)"),
        ("http://me:p%40ss@bücher.de/ä", "http://me:p%40ss@xn--bcher-kva.de/%C3%A4"),
    ],
)
def test_addresses_are_percent_encoded_once(address, asked):
    assert shards.quote_address(address) == asked
    assert shards.quote_address(asked) == asked
