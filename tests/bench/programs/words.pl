# Perl's share of the benchmark: regular expressions, hashes, sorting, subroutine calls, string building.
use strict;
use warnings;

my ($file) = @ARGV;
open(my $text, '<', $file) or die "cannot open $file: $!\n";

# Words, and which word follows which.
my (%count, %after, $last, $lines);
while (my $line = <$text>) {
    $lines++;
    for my $word ($line =~ /\b([a-z]+)\b/gi) {
        my $key = lc $word;
        $count{$key}++;
        $after{"$last $key"}++ if defined $last;
        $last = $key;
    }
    # A rewrite with a back reference and one with code.
    $line =~ s/(\w)(\w)\2/$1-$2/g;
    $line =~ s/\b(\w{7,})\b/ucfirst reverse $1/ge;
    undef $last if $line =~ /[.!?]\s*$/;
}
my @common = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
my @pairs = sort { $after{$b} <=> $after{$a} || $a cmp $b } keys %after;
printf "%d lines, %d words, %d pairs\n", $lines, scalar @common, scalar @pairs;
printf "%-12s %6d   %s\n", $common[$_], $count{ $common[$_] }, $pairs[$_] for 0 .. 19;

# Calls, arrays, numbers.
sub queens {
    my ($row, $size, $columns, $up, $down) = @_;
    return 1 if $row == $size;
    my $found = 0;
    for my $column (0 .. $size - 1) {
        next if $columns->[$column] || $up->[ $row + $column ] || $down->[ $row - $column + $size ];
        $columns->[$column] = $up->[ $row + $column ] = $down->[ $row - $column + $size ] = 1;
        $found += queens($row + 1, $size, $columns, $up, $down);
        $columns->[$column] = $up->[ $row + $column ] = $down->[ $row - $column + $size ] = 0;
    }
    return $found;
}
printf "%d ways to place 7 queens\n", queens(0, 7, [], [], []);

my $joined = join ',', map { sprintf '%05x', $_ * 7919 % 65521 } 1 .. 20000;
my $sum = 0;
$sum = ($sum * 31 + hex) % 1000000007 for split /,/, $joined;
print "sum $sum\n";
