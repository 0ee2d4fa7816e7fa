# What Perl programs spend their time on: regular expressions, hashes, sorting, string building. The argument is how often.
use strict;
use warnings;

open(my $file, '<', 'data/text') or die "data/text: $!";
read($file, my $text, 200_000);
for my $number (1 .. $ARGV[0]) {
    my (%count, $changed);
    $count{lc $1}++ while $text =~ /(\w+)/g;
    my @most = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
    ($changed = $text) =~ s/(\d+)/$1 + $number/ge;
    my $sum = 0;
    $sum = ($sum * 31 + ord) % 1000003 for split //, substr($changed, 1000 * $number, 5000);
    my $lines = join '|', map { scalar reverse } grep { /^\s*def\b/ } split /\n/, $changed;
    print join(' ', @most[0 .. 9]), ' ', length $lines, " $sum\n";
}
