// SHA-256, AES-128-CTR and RSA-2048 signatures by OpenSSL's libcrypto, which chooses its code by CPUID.
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include "workload.h"

static unsigned char buffer[16384];

static void check(int good) {
  if (good == 1) return;
  ERR_print_errors_fp(stderr);
  exit(1);
}

static uint64_t first_bytes(const unsigned char* bytes) {
  uint64_t result;
  memcpy(&result, bytes, sizeof result);
  return result;
}

static uint64_t sha256(long repetitions) {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  unsigned char digest[EVP_MAX_MD_SIZE];
  check(EVP_DigestInit_ex(context, EVP_sha256(), NULL));
  while (repetitions-- > 0) check(EVP_DigestUpdate(context, buffer, sizeof buffer));
  check(EVP_DigestFinal_ex(context, digest, NULL));
  return first_bytes(digest);
}

static uint64_t aes(long repetitions) {
  EVP_CIPHER_CTX* context = EVP_CIPHER_CTX_new();
  static const unsigned char key[16] = "a benchmark's ke", start[16] = "counter";
  static unsigned char output[sizeof buffer];
  int size;
  uint64_t sum = 0;
  check(EVP_EncryptInit_ex(context, EVP_aes_128_ctr(), NULL, key, start));
  while (repetitions-- > 0) {
    check(EVP_EncryptUpdate(context, output, &size, buffer, sizeof buffer));
    sum = sum * 31 + first_bytes(output + size - 8);
  }
  return sum;
}

static uint64_t rsa(long repetitions) {
  FILE* file = fopen("data/rsa.pem", "r");
  EVP_PKEY* key = file ? PEM_read_PrivateKey(file, NULL, NULL, NULL) : NULL;
  check(key != NULL);
  uint64_t sum = 0;
  while (repetitions-- > 0) {
    EVP_MD_CTX* context = EVP_MD_CTX_new();
    unsigned char signature[512];
    size_t size = sizeof signature;
    memcpy(buffer, &sum, sizeof sum);
    check(EVP_DigestSignInit(context, NULL, EVP_sha256(), NULL, key));
    check(EVP_DigestSign(context, signature, &size, buffer, 256));
    EVP_MD_CTX_free(context);
    sum = sum * 31 + first_bytes(signature);
  }
  return sum;
}

int main(int argc, char** argv) {
  static const struct workload workloads[] = {{"sha256", sha256}, {"aes", aes}, {"rsa", rsa}};
  for (size_t i = 0; i < sizeof buffer; ++i) buffer[i] = i * 7;
  return RUN_WORKLOAD(workloads);
}
